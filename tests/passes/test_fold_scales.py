"""Factors per channel move into the weights before them, and outputs stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tokopt
from tests.lower.encoders import PATCHES, Block, Vision
from tokopt.ir.bundle import AppliedPass, Bundle
from tokopt.ir.format import Entry, Schedule
from tokopt.ir.graph import aten, is_call, operand_at
from tokopt.kernels import ops
from tokopt.runtime import load
from tokopt.runtime.format.manifest import read_manifest

CHANNELS = 32

QUANTIZED = ("", "rtn{group=16}", "awq{group=16 symmetric=true}", "int8", "int8{activations=static}")


class Layers(nn.Module):
    """What ``body`` makes of x [batch, tokens, 32], two linears and a factor [32]."""

    def __init__(self, body: Callable[[Layers, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.plain = nn.Linear(CHANNELS, CHANNELS, bias=False)
        self.factor = nn.Parameter(torch.randn(CHANNELS))
        self.table = nn.Parameter(torch.randn(3, 1, CHANNELS))
        self.matrix = nn.Parameter(torch.randn(CHANNELS, CHANNELS) / 6)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class Factor(nn.Module):
    """A factor per channel, as LayerScale has it."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(CHANNELS) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def captured_vision() -> Bundle:
    """An encoder whose branches end with factors."""
    torch.manual_seed(0)
    model = Vision()
    for block in model.blocks:
        assert isinstance(block, Block)
        block.add_module("out", nn.Sequential(block.out, Factor()))
        block.add_module("down", nn.Sequential(block.down, Factor()))
    return tokopt.capture(model.eval(), (torch.randn(3, PATCHES, 12),))


def captured(body: Callable[[Layers, Tensor], Tensor]) -> Bundle:
    return tokopt.capture(Layers(body).eval(), (inputs(),))


def inputs(batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, CHANNELS, generator=torch.Generator().manual_seed(1))


def folded(bundle: Bundle) -> tuple[Bundle, AppliedPass]:
    """The bundle after the pass, which computes the same for a batch of another size, and what the pass did."""
    made = tokopt.optimize(bundle, "fold_scales")
    for got, wanted in zip(made(inputs(3)), bundle(inputs(3)), strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
    return made, made.history[-1]


def products(bundle: Bundle) -> int:
    return sum(is_call(node, aten.mul.Tensor) for node in bundle.main.module.graph.nodes)


FOLDED = {
    "linear": lambda m, x: x + m.first(x) * m.factor,
    "without bias": lambda m, x: x + m.factor * m.plain(x),
    "row of a table": lambda m, x: m.first(x) * m.table[1],
    "computed factor": lambda m, x: m.first(x) * m.factor.exp(),
    "several axes": lambda m, x: m.first(x) * m.factor.view(1, 1, -1),
    "two factors": lambda m, x: m.first(x) * m.factor * m.table[0, 0],
    "another view": lambda m, x: m.first(x.flatten(0, 1)).view(-1, 5, CHANNELS) * m.factor,
    "bias of its own": lambda m, x: (m.plain(x) + m.table[0]) * m.factor,
    "sum": lambda m, x: (m.first(x) + m.second(x.tanh())) * m.factor,
    "factor per token": lambda m, x: (m.plain(x) * x.amax(-1, keepdim=True) + m.table[0]) * m.factor,
    "matrix": lambda m, x: (x @ m.matrix) * m.factor,
    "transposed matrix": lambda m, x: (x @ m.matrix.T) * m.factor,
}


@pytest.mark.parametrize("name", FOLDED)
def test_a_factor_of_linears_is_folded(name: str) -> None:
    """All constant factors are gone; those per token stay."""
    made, done = folded(captured(FOLDED[name]))
    assert done.matches == 1 + (name == "two factors")
    assert products(made) == (name == "factor per token")


@pytest.mark.parametrize("pipeline", QUANTIZED)
def test_codes_stay_and_their_scales_take_the_factor(pipeline: str) -> None:
    bundle = captured(lambda m, x: x + m.first(x) * m.factor)
    bundle = tokopt.optimize(bundle, pipeline, calibration=[inputs()])
    made, done = folded(bundle)
    assert done.matches == 1 and products(made) == products(bundle) - 1
    before, after = (
        [node for node in one.main.module.graph.nodes if is_call(node, ops.dequantize_weight.default)]
        for one in (bundle, made)
    )
    assert len(before) == len(after) == bool(pipeline)
    for old, new in zip(before, after, strict=True):
        assert operand_at(new, 0).target == operand_at(old, 0).target
        assert operand_at(new, 1).target != operand_at(old, 1).target


STAYS = {
    "read elsewhere": (
        lambda m, x: (y := m.first(x)) * m.factor + y,
        "its result is read by something else",
    ),
    "weight elsewhere": (
        lambda m, x: m.first(x) * m.factor + m.first(x.tanh()),
        "its weight is read by something else",
    ),
    "computed weight": (
        lambda m, x: (x @ (m.matrix * m.table[0])) * m.factor,
        "its weight is computed from several parameters",
    ),
    "half": (
        lambda m, x: m.first(x).half().float() * m.factor,
        "its result is rounded to another type",
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_a_factor_that_stays_is_refused_with_the_reason(name: str) -> None:
    body, reason = STAYS[name]
    bundle = captured(body)
    made, done = folded(bundle)
    assert made.main is bundle.main and done.matches == 0
    assert len(done.notes) == 1 and f"its factor stays beside it: {reason}" in done.notes[0]


NOTHING = {
    "one number": lambda m, x: m.first(x) * 0.5,
    "norm": lambda m, x: (y := m.first(x)) * y.pow(2).mean(-1, keepdim=True).rsqrt() * m.factor,
    "residual": lambda m, x: (x + m.first(x)) * m.factor,
    "gate": lambda m, x: m.first(x) * m.second(x),
    "activation": lambda m, x: m.first(x).relu() * m.factor,
    "added to itself": lambda m, x: ((y := m.first(x)) + y) * m.factor,
    "factor per token": lambda m, x: m.first(x) * m.table[:, :, :1].mean(0),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_is_no_factor_of_a_linear_is_left_alone(name: str) -> None:
    bundle = captured(NOTHING[name])
    made, done = folded(bundle)
    assert made.main is bundle.main
    assert (done.matches, done.notes) == (0, ("no linear has a factor per channel",))


def test_export_folds_and_says_so(tmp_path: Path) -> None:
    """It stands in the history, and the artifact is compared with the program before it."""
    bundle, lines = captured(lambda m, x: m.first(x) * m.factor + m.second(x)), list[str]()
    path = tokopt.export(bundle, tmp_path / "model.tokopt", progress=lines.append)
    manifest = read_manifest(path)
    assert manifest.pipeline == "fold_scales" and manifest.semantics == "exact"
    assert "fold_scales: forward: factors multiplied into weights: 1" in lines
    assert "forward: products of one tensor with several weights as one product: 1 of 1" in lines
    got = load(path, threads=1)(inputs().numpy())
    np.testing.assert_allclose(got, bundle(inputs())[0].numpy(), atol=1e-5)


def test_export_says_which_factor_stays(tmp_path: Path) -> None:
    lines: list[str] = []
    path = tokopt.export(captured(STAYS["read elsewhere"][0]), tmp_path / "m.tokopt", progress=lines.append)
    assert read_manifest(path).pipeline == ""
    assert any(line.startswith("fold_scales: first: its factor stays") for line in lines)


def test_every_program_is_folded() -> None:
    """Of two programs that run one after the other, both."""
    one = captured(lambda m, x: m.first(x) * m.factor)
    (given,) = one.main.outputs
    other = replace(one.main, outputs=(replace(given, name="other"),))
    both = replace(
        one,
        programs={"forward": one.main, "again": other},
        schedule=Schedule((Entry("forward", "encode"), Entry("again", "encode"))),
    )
    made = tokopt.optimize(both, "fold_scales")
    assert made.history[-1].matches == 2
    assert not any(made.programs[name] is both.programs[name] for name in both.programs)


def test_a_token_reduction_may_follow() -> None:
    """Weights alone are changed, so one reduction after another is still one rewrite of the model."""
    bundle = captured_vision()
    wanted = tokopt.optimize(bundle, "tome{r=2},tome{r=2}")
    made = tokopt.optimize(bundle, "tome{r=2},fold_scales,tome{r=2}")
    assert made.history[1].matches == 4
    for got, value in zip(made.main(*bundle.main.example), wanted.main(*bundle.main.example), strict=True):
        torch.testing.assert_close(got, value, atol=1e-4, rtol=1e-3)
