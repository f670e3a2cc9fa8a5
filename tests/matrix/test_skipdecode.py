"""SkipDecode: later tokens have fewer blocks, and every layer's cache has what the stream that passed it gives."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tokopt
from tests import node
from tests.matrix.language import prompt
from tests.matrix.test_drop_blocks import idle
from tests.zoo.decoders import _GEMMA, GROUPED, SHAPE, _hugging_face
from tokopt.analysis.blocks import blocks_of
from tokopt.errors import PassError, PassRefused, PipelineSyntaxError
from tokopt.frontend.language import capture_lm
from tokopt.ir.bundle import Bundle
from tokopt.ir.export import placeholders
from tokopt.ir.graph import ancestors, is_call, operand_at, results
from tokopt.kernels import ops
from tokopt.passes.exit.skipdecode import kept_blocks, levels
from tokopt.runtime import LanguageModel, load
from tokopt.runtime.loop import Emission

DEPTH = 5
MODELS = {
    "llama": (_hugging_face("Llama", **{**GROUPED, "num_hidden_layers": DEPTH}), "model.layers"),
    "gemma3": (
        _hugging_face(
            "Gemma3Text",
            **{**_GEMMA, "num_hidden_layers": DEPTH},
            layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        ),
        "model.layers",
    ),
    "gpt_neox": (_hugging_face("GPTNeoX", **{**SHAPE, "num_hidden_layers": DEPTH}), "gpt_neox.layers"),
}
"""Pre-norm, sliding windows beside full layers, and parallel branches: the model, and where its layers are."""

TEXT = "skipdecode{min=2 warmup=1 over=6 levels=3}"


@cache
def model(name: str) -> nn.Module:
    return MODELS[name][0]()


@cache
def bundle(name: str) -> Bundle:
    return capture_lm(model(name))


@cache
def artifact(name: str, text: str) -> LanguageModel:
    import tempfile
    from pathlib import Path

    path = Path(tempfile.mkdtemp()) / "model.tokopt"
    tokopt.export(tokopt.optimize(bundle(name), text, strict=True, calibration=[prompt(24)]), path)
    assert tokopt.verify(path).ok
    return load(path, threads=1)


class Naive:
    """The method by transformers' own means: a skipped layer writes its cache, and returns what it is given."""

    def __init__(self, name: str, most: int, least: int, warmup: int, over: int, count: int) -> None:
        self.model, self.home = model(name), MODELS[name][1]
        self.depth = levels(most, least, over, count)
        self.warmup = warmup

    def skipped(self, token: int) -> list[str]:
        depth = [level.depth for level in self.depth if level.since <= token][-1]
        kept = kept_blocks(DEPTH, depth, self.warmup)
        return [f"{self.home}.{block}" for block in range(DEPTH) if block not in kept]

    @torch.no_grad()
    def write(self, ids: list[int], count: int) -> tuple[list[int], Any]:
        """The greedy tokens, and transformers' cache at the end."""
        from transformers import DynamicCache

        held = DynamicCache(config=self.model.config)  # type: ignore[arg-type]
        logits = self.model(torch.tensor([ids]), past_key_values=held, use_cache=True).logits
        made = [int(logits[0, -1].argmax())]
        while len(made) < count:
            with idle(self.model, self.skipped(len(made) - 1)):
                logits = self.model(torch.tensor([made[-1:]]), past_key_values=held, use_cache=True).logits
            made.append(int(logits[0, -1].argmax()))
        return made, held


def likeliest(emission: Emission) -> int:
    assert emission.logits is not None
    return int(emission.logits.argmax())


def naive(name: str) -> Naive:
    return Naive(name, DEPTH, 2, 1, 6, 3)


@pytest.mark.parametrize("name", MODELS)
def test_the_text_is_that_of_the_naive_method(name: str) -> None:
    """Alone, in a padded batch, and in the host in Node.js."""
    made, ids, other = artifact(name, TEXT), prompt(11, seed=1), prompt(17, seed=2)
    wanted = [naive(name).write(one, 24)[0] for one in (ids, other)]
    assert list(made.generate(ids, max_tokens=24).tokens) == wanted[0]
    assert [list(row.tokens) for row in made.generate([ids, other], max_tokens=24)] == wanted
    if name == "llama":
        assert node.generate(made.path, ids, 24) == wanted[0]


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_every_layer_holds_what_the_stream_that_passed_it_gives(name: str) -> None:
    """The cache after 20 tokens of three depths is that of the naive method, layer by layer."""
    ids = prompt(11, seed=3)
    wanted, held = naive(name).write(ids, 20)
    made = artifact(name, TEXT)
    request = made.open(1, 64)
    got = [likeliest(request.prefill([ids]))]
    while len(got) < 20:
        got.append(likeliest(request.step(np.array([got[-1:]]), np.array([[len(ids) + len(got) - 1]]))))
    assert got == wanted
    count = len(ids) + 19
    states = {
        (s.kind, s.layer): request.buffers.read(s.name) for s in made.manifest.states if s.layer is not None
    }
    for layer in range(DEPTH):
        for kind, tensor in (("key", held.layers[layer].keys), ("value", held.layers[layer].values)):
            np.testing.assert_allclose(states[kind, layer][:, :, :count], tensor.numpy(), atol=2e-4)


def test_a_conversation_goes_on_with_the_whole_model() -> None:
    """After a further prompt the depth begins anew, on a cache without holes."""
    ids, more = prompt(9, seed=4), prompt(6, seed=5)
    naively = naive("llama")
    first, held = naively.write(ids, 16)
    made = artifact("llama", TEXT)
    request = made.open(1, 64)
    request.prefill([ids])
    for place, token in enumerate(first[:-1]):
        request.step(np.array([[token]]), np.array([[len(ids) + place]]))
    new = [first[-1], *more]
    positions = len(ids) + len(first) - 1 + np.arange(len(new))[None]
    logits = request.step(np.array([new]), positions, role="prefill").logits
    with torch.no_grad():
        wanted = naively.model(torch.tensor([new]), past_key_values=held, use_cache=True).logits
    assert logits is not None
    np.testing.assert_allclose(logits[0, -1], wanted[0, -1].numpy(), atol=2e-4)
    assert request.schedule.decode(None, request.written) == request.schedule.entry("decode")


# --- the schedule -----------------------------------------------------------------------------------------

depths = st.integers(1, 40).flatmap(
    lambda blocks: st.integers(1, blocks).flatmap(
        lambda most: st.integers(1, most).flatmap(
            lambda least: st.tuples(st.just(blocks), st.just(most), st.just(least), st.integers(0, least))
        )
    )
)


@given(depths, st.integers(1, 200), st.integers(2, 8))
def test_the_blocks_of_a_token_are_among_those_of_the_one_before(
    sizes: tuple[int, int, int, int], over: int, count: int
) -> None:
    """From the first to the last level, and never fewer than the line between them says."""
    blocks, most, least, warmup = sizes
    made = levels(most, least, over, count)
    assert made[0].since == 0 and made[-1].depth == least and made[-1].since <= over
    assert (made[0].depth == most) or over < most - least
    assert [level.since for level in made] == sorted({level.since for level in made}) and len(made) <= count
    before = set(range(blocks))
    for token in range(over + 3):
        depth = [level.depth for level in made if level.since <= token][-1]
        kept = set(kept_blocks(blocks, depth, warmup))
        assert kept <= before and len(kept) == depth and set(range(warmup)) <= kept
        line = most - (most - least) * min(token / over, 1)
        assert depth >= line - 1e-9
        before = kept


few = st.integers(1, DEPTH).flatmap(
    lambda least: st.tuples(st.just(least), st.integers(least, DEPTH), st.integers(0, least))
)


@given(few)
@settings(max_examples=15, deadline=None)
def test_every_program_writes_every_layer_of_every_token(sizes: tuple[int, int, int]) -> None:
    """Keys and values are made of the new tokens, whatever is skipped, and written where the others are."""
    least, most, warmup = sizes
    whole = bundle("llama")
    made = tokopt.optimize(whole, f"skipdecode{{min={least} max={most} warmup={warmup} over=4}}")
    for entry in made.schedule.of_role("decode"):
        program = made.programs[entry.program]
        assert program.aliases == whole.main.aliases
        named = dict(zip(placeholders(program.module), program.inputs, strict=True))
        (tokens,) = (place for place, spec in named.items() if spec.role == "tokens")
        written = set()
        for spec, value in zip(program.outputs, results(program.module.graph), strict=True):
            if spec.state is not None and spec.state.startswith(("key", "value")):
                assert is_call(value, ops.cache_write) and tokens in ancestors(operand_at(value, 1))
                written.add(spec.state)
        assert written == {state.name for state in whole.states if state.layer is not None}


# --- limits and company -----------------------------------------------------------------------------------


def test_all_blocks_always_is_the_model() -> None:
    whole = bundle("llama")
    same = tokopt.optimize(whole, f"skipdecode{{min={DEPTH} max={DEPTH}}}")
    assert same.programs == whole.programs and same.schedule == whole.schedule
    assert same.history[-1].matches == 0


def test_the_programs_share_their_parameters() -> None:
    made = tokopt.optimize(bundle("llama"), TEXT, strict=True)
    entries = list(made.schedule.of_role("decode"))
    found = [len(blocks_of(made.programs[entry.program].module.graph)) for entry in entries]
    assert (found, [entry.since for entry in entries]) == ([5, 3, 2], [0, 4, 6])
    whole = {value.data_ptr() for value in bundle("llama").main.module.state_dict().values()}
    for program in made.programs.values():
        assert {value.data_ptr() for value in program.module.state_dict().values()} <= whole


BRIEF = "skipdecode{min=2 warmup=1 over=6 levels=2}"
"""All blocks or two: another level is another program of the same kind."""


@pytest.mark.parametrize(
    "text",
    [
        f"h2o{{budget=24 sinks=2 recent=4 every=8}},{BRIEF}",
        f"int8_kv,{BRIEF}",
        f"rtn{{bits=8 group=16}},{BRIEF}",
        f"drop_blocks{{blocks=[2]}},{BRIEF}",
        f"sample,{BRIEF}",
        f"{BRIEF},rtn{{bits=8 group=16}}",
    ],
)
def test_it_goes_with_other_passes(text: str) -> None:
    """A row of a batch is what it is alone."""
    made, ids = artifact("llama", text), [prompt(30, seed=7), prompt(19, seed=8)]
    together = made.generate(ids, max_tokens=24)
    assert [made.generate(one, max_tokens=24).tokens for one in ids] == [row.tokens for row in together]
    assert len({entry.program for entry in made.manifest.schedule.of_role("decode")}) == 2


def test_what_it_cannot_do_it_says() -> None:
    whole = bundle("llama")
    with pytest.raises(PassError, match="max=9 and min=2, but the model has 5 blocks"):
        tokopt.optimize(whole, "skipdecode{min=2 max=9}")
    for text in ("skipdecode{min=0}", "skipdecode{min=3 max=2}", "skipdecode{min=2 warmup=3}", "skipdecode"):
        with pytest.raises(PipelineSyntaxError, match="skipdecode"):
            tokopt.optimize(whole, text)
    once = tokopt.optimize(whole, TEXT)
    for text in ("h2o{budget=64}", "speculate", TEXT, "drop_blocks{blocks=[1]}"):
        with pytest.raises(PassError, match="here they are two"):
            tokopt.optimize(once, text)
    with pytest.raises(PassRefused, match="all 5 blocks always run"):
        tokopt.optimize(whole, "skipdecode{min=5}", strict=True)
