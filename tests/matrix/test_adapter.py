"""An adapter: the model with a hook that does as much behind one of its layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tokopt
from tests.matrix.language import prompt
from tests.matrix.test_exit import shortened
from tests.matrix.test_matrix import captured
from tests.matrix.test_skipdecode import DEPTH, MODELS, bundle, model
from tests.zoo import ZOO
from tokopt.analysis.blocks import blocks_of
from tokopt.errors import PassError, PipelineSyntaxError
from tokopt.runtime import load

RANK = 3


def weights(channels: int, *, biases: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"down.weight": (RANK, channels), "up.weight": (channels, RANK)}
    shapes |= {"down.bias": (RANK,), "up.bias": (channels,)} if biases else {}
    return {name: torch.randn(shape, generator=generator) / 2 for name, shape in shapes.items()}


def text_of(folder: Path, at: int, tensors: dict[str, Tensor], more: str = "") -> str:
    save_file(tensors, folder / "adapter.safetensors")
    return f'adapter{{at={at} file="{folder / "adapter.safetensors"}"{more}}}'


def adapted(stream: Tensor, tensors: dict[str, Tensor], activation: str = "gelu") -> Tensor:
    """The reference."""
    inner = stream @ tensors["down.weight"].T + tensors.get("down.bias", 0)
    inner = inner if activation == "linear" else getattr(nn.functional, activation)(inner)
    return stream + inner @ tensors["up.weight"].T + tensors.get("up.bias", 0)


def channels(name: str) -> int:
    return blocks_of(bundle(name).main.module.graph)[0].stream.meta["val"].shape[-1]


def with_hook(name: str, at: int, tensors: dict[str, Tensor], tokens: Tensor, activation: str) -> Tensor:
    """The logits of the model in eager PyTorch, with the adapter behind a layer."""
    layer = model(name).get_submodule(MODELS[name][1])[at - 1]  # type: ignore[index]

    def hook(_: nn.Module, __: object, made: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if isinstance(made, Tensor):
            return adapted(made, tensors, activation)
        return (adapted(made[0], tensors, activation), *made[1:])

    handle = layer.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model(name)(tokens).logits
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("name", "at", "activation"),
    [("llama", 2, "gelu"), ("gpt_neox", DEPTH, "silu"), ("gemma3", 1, "linear")],
)
def test_it_is_the_model_with_a_hook(name: str, at: int, activation: str, tmp_path: Path) -> None:
    """Between layers, behind the last one, in models of several styles; with biases and without."""
    tensors = weights(channels(name), biases=activation != "linear")
    made = tokopt.optimize(
        bundle(name), text_of(tmp_path, at, tensors, f" activation={activation}"), strict=True
    )
    tokens = torch.tensor([prompt(17, seed) for seed in (1, 2)])
    wanted = with_hook(name, at, tensors, tokens, activation)
    torch.testing.assert_close(made(tokens)[0], wanted, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(made(tokens)[0], bundle(name)(tokens)[0], atol=1e-2)


def test_zeros_change_nothing(tmp_path: Path) -> None:
    tensors = weights(channels("llama")) | {"up.weight": torch.zeros(channels("llama"), RANK)}
    tensors["up.bias"] = torch.zeros(channels("llama"))
    made = tokopt.optimize(bundle("llama"), text_of(tmp_path, 2, tensors), strict=True)
    tokens = torch.tensor([prompt(12)])
    assert torch.equal(made(tokens)[0], bundle("llama")(tokens)[0])


def test_the_early_head_of_a_shortened_model(tmp_path: Path) -> None:
    """The first blocks, the adapter and the head: a model that writes texts, with the caches of its own layers."""
    tensors = weights(channels("llama"))
    text = f"drop_blocks{{blocks=[2,3,4]}},{text_of(tmp_path, 2, tensors)}"
    made = tokopt.optimize(bundle("llama"), text, strict=True)
    early = load(tokopt.export(made, tmp_path / "early.tokopt"), threads=1)
    assert {state.layer for state in made.states if state.layer is not None} == {0, 1}
    ids = prompt(9)
    for token in early.generate(ids, max_tokens=6).tokens:
        assert token == int(made(torch.tensor([ids]))[0][0, -1].argmax())
        ids = [*ids, token]
    layers = model("llama").get_submodule("model.layers")
    hidden: list[Tensor] = []
    handle = layers[1].register_forward_hook(lambda *given: hidden.append(_first(given[2])))  # type: ignore[index]
    with torch.no_grad():
        model("llama")(torch.tensor([ids]))
        handle.remove()
        end = model("llama").get_submodule("model.norm")(adapted(hidden[0], tensors))
        wanted = model("llama").get_submodule("lm_head")(end)
    torch.testing.assert_close(made(torch.tensor([ids]))[0], wanted, atol=1e-4, rtol=1e-3)


def _first(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def test_encoders_are_cut_and_merged_around_it(tmp_path: Path) -> None:
    """Cut at the adapter both halves are the whole; merged before or after it is the same model."""
    entry, inputs = ZOO["vit"], tuple(ZOO["vit"].inputs(seed=3).values())
    text = text_of(tmp_path, 1, weights(48))
    made = tokopt.optimize(captured("vit"), text, strict=True)
    halves = tokopt.optimize(made, "split{at=1}", strict=True)
    assert all(map(torch.equal, halves(*inputs), made(*inputs)))
    orders = [
        tokopt.optimize(captured("vit"), pipeline, strict=True)(*inputs)
        for pipeline in (f"{text},tome{{r=3}}", f"tome{{r=3}},{text}")
    ]
    for one, other in zip(*orders, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    short = tokopt.capture(shortened(entry, 1), inputs, dynamic=entry.dynamic)
    last = tokopt.optimize(short, text, strict=True)(*inputs)
    dropped = tokopt.optimize(captured("vit"), f"drop_blocks{{blocks=[1,2]}},{text}", strict=True)(*inputs)
    for one, other in zip(last, dropped, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("tensors", "at", "message"),
    [
        ({}, 1, "must have 'down.weight' of shape .0, 48., and has no such tensor"),
        ({"down.weight": torch.ones(2, 5)}, 1, "'down.weight' of shape .2, 48., and has one of shape .2, 5."),
        (
            {**weights(48), "up.bias": torch.full((48,), torch.nan)},
            1,
            "'up.bias' of .* holds NaN or infinity",
        ),
        (weights(48), 4, "at=4, but the model has 3 blocks"),
        (weights(48), 0, "at=0 is behind no block"),
    ],
)
def test_what_does_not_fit_is_refused(
    tensors: dict[str, Tensor], at: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises((PassError, PipelineSyntaxError), match=message):
        tokopt.optimize(captured("vit"), text_of(tmp_path, at, tensors))
