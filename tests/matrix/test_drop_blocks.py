"""Removing blocks: what is left is the model whose modules do nothing, on every architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import tokopt
from tests.matrix import language
from tests.matrix.language import artifact, prompt
from tests.matrix.test_matrix import assert_close, captured
from tests.zoo import ZOO
from tests.zoo.decoders import DECODERS
from tokopt.analysis.blocks import Block, blocks_of
from tokopt.analysis.calibration import Site, observe
from tokopt.analysis.linears import find_linears
from tokopt.errors import PassError, PassRefused, PipelineSyntaxError
from tokopt.ir.bundle import Bundle
from tokopt.passes.exit.heal import Products
from tokopt.passes.exit.influence import influences
from tokopt.rewrite.edit import open_graph
from tokopt.runtime import load

MODULES = [name for name in DECODERS if not name.startswith("hand")]
"""Decoders whose layers are modules."""


def samples(name: str) -> list[Any]:
    if name in ZOO:
        return [tuple(ZOO[name].inputs(seed=seed).values()) for seed in (3, 4)]
    return [prompt(24, seed) for seed in (3, 4)]


def bundle(name: str) -> Bundle:
    return captured(name) if name in ZOO else language.bundle(name)


def blocks(bundle: Bundle) -> list[Block]:
    return blocks_of(bundle.main.module.graph)


@contextmanager
def idle(model: nn.Module, paths: list[str]) -> Iterator[None]:
    """The model, with modules that return what they are given."""

    def same(module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        return (stream, *result[1:]) if isinstance(result, tuple) else stream

    handles = [model.get_submodule(path).register_forward_hook(same, with_kwargs=True) for path in paths]
    yield
    for handle in handles:
        handle.remove()


def module_of(block: Block) -> str:
    """The module that is the whole block: up to and with the last number of the attention's path."""
    parts = block.site.path.removeprefix("decoder.model.").split(".")
    last = max(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: last + 1])


@pytest.mark.parametrize("name", ZOO)
def test_an_encoder_without_a_block_is_the_one_whose_module_is_idle(name: str) -> None:
    entry, whole = ZOO[name], bundle(name)
    inputs = entry.inputs(batch=2, seed=7)
    for block in blocks(whole):
        made = tokopt.optimize(whole, f"drop_blocks{{blocks=[{block.index}]}}", strict=True)
        assert len(blocks(made)) == len(blocks(whole)) - 1
        model = entry.build()
        with torch.no_grad(), idle(model, [module_of(block)]):
            wanted = tree_leaves(model(**inputs))
        for got, expected in zip(made(*inputs.values()), wanted, strict=True):
            assert_close(entry, inputs, got, expected)


@pytest.mark.parametrize("name", MODULES)
def test_a_decoder_without_a_block_is_the_one_whose_module_is_idle(name: str) -> None:
    """Its cache is gone, too; the layers that are left count from 0."""
    whole, tokens = bundle(name), torch.tensor([prompt(17, seed) for seed in (1, 2)])
    for block in blocks(whole):
        made = tokopt.optimize(whole, f"drop_blocks{{blocks=[{block.index}]}}", strict=True)
        kinds = [(state.kind, state.layer) for state in made.states if state.layer is not None]
        assert kinds == [("key", 0), ("value", 0)]
        model = language.model(name)
        with torch.no_grad(), idle(model, [module_of(block)]):
            wanted = model(tokens, use_cache=False).logits
        torch.testing.assert_close(made(tokens)[0], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "hand_rotary"])
def test_text_goes_on_without_a_block(name: str) -> None:
    """Token by token from a cache as from the whole text again."""
    text = "drop_blocks{blocks=[0]}"
    made, ids = tokopt.optimize(bundle(name), text), prompt(11)
    got = artifact(name, text).generate(ids, max_tokens=12).tokens
    for token in got:
        assert token == int(made(torch.tensor([ids]))[0][0, -1].argmax())
        ids.append(token)


# --- influence --------------------------------------------------------------------------------------------


def naive_influence(stream: Tensor, end: Tensor, real: Tensor) -> float:
    """From the paper: 1 less the mean of the cosines, token by token."""
    found = [
        float(x @ y / (x.norm() * y.norm()))
        for row in range(len(stream))
        for x, y, seen in zip(stream[row].double(), end[row].double(), real[row], strict=True)
        if seen
    ]
    return 1 - sum(found) / len(found)


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2"])
def test_influence_is_that_of_the_formula(name: str) -> None:
    """Over real tokens alone, sample after sample."""
    whole = bundle(name)
    module = open_graph(whole.main)
    found = blocks_of(module.graph)
    got = influences(Site(whole, whole.main_name, module), found, samples(name)[:1])
    model, seen = (
        (ZOO[name].build() if name in ZOO else language.model(name)),
        dict[int, tuple[Tensor, Tensor]](),
    )

    def note(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            seen[index] = (stream, result[0] if isinstance(result, tuple) else result)

        return hook

    for block in found:
        model.get_submodule(module_of(block)).register_forward_hook(note(block.index), with_kwargs=True)
    inputs = ZOO[name].inputs(seed=3) if name in ZOO else {"input_ids": torch.tensor([samples(name)[0]])}
    with torch.no_grad():
        model(**inputs)
    mask = ZOO[name].mask if name in ZOO else None
    real = inputs[mask].bool() if mask else torch.ones(seen[0][0].shape[:2], dtype=torch.bool)
    assert mask is None or not real.all()
    wanted = [naive_influence(*seen[i], real) for i in range(len(found))]
    assert got == pytest.approx(wanted, abs=1e-5)


def test_the_blocks_of_least_influence_go_first() -> None:
    made = tokopt.optimize(bundle("vit"), "drop_blocks{count=2}", calibration=samples("vit"), strict=True)
    listed, *removed = made.history[-1].notes
    found = [float(part.split()[-1]) for part in listed.removeprefix("influence of the blocks: ").split(", ")]
    order = sorted(range(3), key=found.__getitem__)
    assert [note.split()[2] for note in removed] == [str(number) for number in order[:2]]
    assert made.history[-1].matches == 2 and made.semantics == "approximate"


class Scaling(nn.Module):
    """Two blocks that turn the stream by nothing, and one that turns it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.TransformerEncoderLayer(16, 2, 16, batch_first=True, norm_first=True) for _ in range(3)]
        self.layers = nn.ModuleList(blocks)
        for block in blocks[1:]:
            for parameter in (*block.self_attn.out_proj.parameters(), *block.linear2.parameters()):
                parameter.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_of_equal_influence_the_first_goes_and_idle_blocks_leave_the_model_as_it_is() -> None:
    x = torch.randn(3, 5, 16)
    whole = tokopt.capture(Scaling().eval(), (x,))
    made = tokopt.optimize(whole, "drop_blocks{count=1}", calibration=[(x,)], strict=True)
    assert made.history[-1].notes[1].startswith("removed block 1")
    both = tokopt.optimize(whole, "drop_blocks{count=2 again=true}", calibration=[(x,)], strict=True)
    assert [note.split()[2] for note in both.history[-1].notes[1:]] == ["1", "2"]
    torch.testing.assert_close(both(x)[0], whole(x)[0])


# --- healing ----------------------------------------------------------------------------------------------


def products(rows: int, seed: int = 0) -> tuple[Products, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    now, before, weight = (torch.randn(n, 6, generator=generator) for n in (rows, rows, 4))
    made = Products.of(6)
    for part in (slice(0, rows // 2), slice(rows // 2, rows)):
        made.before = before[None, part]
        made.add(now[None, part])
    return made, now.double(), before.double(), weight.double()


def test_without_damping_the_fit_is_least_squares() -> None:
    made, now, before, weight = products(40)
    fitted = made.refitted(weight, 0.0)
    wanted = torch.linalg.lstsq(now, before @ weight.T).solution.T
    torch.testing.assert_close(fitted, wanted)


def test_much_damping_leaves_the_weight_alone() -> None:
    made, _, _, weight = products(40)
    torch.testing.assert_close(made.refitted(weight, 1e12), weight)


def test_damping_is_that_of_the_formula() -> None:
    made, now, before, weight = products(40)
    square = now.T @ now
    ridge = 0.3 * square.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    change = torch.linalg.inv(square + ridge) @ now.T @ (before - now) @ weight.T
    torch.testing.assert_close(made.refitted(weight, 0.3), weight + change.T)


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "phi"])
def test_healed_linears_give_what_they_gave_more_closely(name: str) -> None:
    """Measured at the refitted linears' outputs, on the inputs that they were fitted to."""
    whole, text = bundle(name), "drop_blocks{blocks=[0] heal=%s ridge=0.0001}"
    plain, healed = (
        tokopt.optimize(whole, text % word, calibration=samples(name), strict=True)
        for word in ("false", "true")
    )
    paths = healed.history[-1].notes[-1].removeprefix("refitted ").split(", ")
    assert len(paths) >= 1

    def outputs(one: Bundle) -> list[Tensor]:
        module, found = open_graph(one.main), list[Tensor]()
        nodes = [linear.node for linear in find_linears(module.graph) if linear.path in paths]
        assert len(nodes) == len(paths)
        observe(Site(one, one.main_name, module), dict.fromkeys(nodes, found.append), samples(name))
        return found

    target, before, after = map(outputs, (whole, plain, healed))
    errors = [
        sum(float(((a - b) ** 2).mean()) for a, b in zip(one, target, strict=True)) for one in (before, after)
    ]
    assert errors[1] < 0.9 * errors[0]


def test_a_tied_head_is_not_refitted() -> None:
    made = tokopt.optimize(bundle("llama"), "drop_blocks{blocks=[1] heal=true}", calibration=samples("llama"))
    assert made.history[-1].notes[-1].endswith("is not refitted: its weight is another layer's too")


# --- what it goes with ------------------------------------------------------------------------------------

COMPOSED = (
    "drop_blocks{blocks=[0]},h2o{budget=24 sinks=2 recent=4 every=8}",
    "drop_blocks{blocks=[1]},rtn{bits=8 group=16}",
    "drop_blocks{blocks=[0]},int8_kv",
    "rtn{bits=8 group=16},drop_blocks{blocks=[1]}",
    "drop_blocks{blocks=[0]},sample",
    "drop_blocks{blocks=[1]},speculate{nodes=4}",
)


@pytest.mark.parametrize("text", COMPOSED)
def test_what_is_left_is_a_model_like_any_other(text: str, tmp_path: Any) -> None:
    made = tokopt.optimize(bundle("llama"), text, strict=True, calibration=samples("llama"))
    tokopt.export(made, tmp_path / "model.tokopt")
    model = load(tmp_path / "model.tokopt", threads=1)
    ids = [prompt(30, seed=5), prompt(21, seed=6)]
    together = model.generate(ids, max_tokens=20)
    assert [model.generate(one, max_tokens=20).tokens for one in ids] == [row.tokens for row in together]


def test_tokens_are_merged_in_the_blocks_that_are_left() -> None:
    made = tokopt.optimize(bundle("vit"), "drop_blocks{blocks=[1]},tome{r=4}", strict=True)
    assert made.history[-1].matches == 2
    with pytest.raises(PassRefused, match="what it computes is read after it"):
        tokopt.optimize(bundle("vit"), "tome{r=4},drop_blocks{blocks=[1]}", strict=True)


def test_what_it_cannot_do_it_says() -> None:
    whole = bundle("vit")
    same = tokopt.optimize(whole, "drop_blocks{count=0}")
    assert same.main is whole.main and same.history[-1].matches == 0
    with pytest.raises(PassError, match="3 blocks of 3 would go; leave at least one"):
        tokopt.optimize(whole, "drop_blocks{count=3}", calibration=samples("vit"))
    with pytest.raises(PassError, match="needs inputs to calibrate with"):
        tokopt.optimize(whole, "drop_blocks{count=1}")
    with pytest.raises(PassError, match="no block 5; the model has 3"):
        tokopt.optimize(whole, "drop_blocks{blocks=[5]}")
    with pytest.raises(PassError, match="put it before split or exit"):
        tokopt.optimize(whole, "split{at=1},drop_blocks{blocks=[1]}")
    for text in ("drop_blocks", "drop_blocks{count=1 blocks=[1]}", "drop_blocks{blocks=[1,1]}"):
        with pytest.raises(PipelineSyntaxError, match="drop_blocks"):
            tokopt.optimize(whole, text)
    evicted = tokopt.optimize(bundle("llama"), "h2o{budget=64}")
    with pytest.raises(PassRefused, match="put drop_blocks before the eviction"):
        tokopt.optimize(evicted, "drop_blocks{blocks=[1]}", strict=True)
