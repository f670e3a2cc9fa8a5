"""Products of one tensor become one product, and the graph computes the same; export compares it."""

from __future__ import annotations

import collections
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import tokopt
from tokopt.runtime import load


class Projections(nn.Module):
    """x [batch, tokens, 32] through three linears, the first with an output of its own; another reads what follows."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(32, out, bias=bias) for out in (48, 16, 16))
        self.out = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        key, value = self.key(x), self.value(x)
        return self.query(x), key, self.out(key * value.sigmoid())


PIPELINES = ("", "rtn{group=16}", "rtn{group=16 bits=8 symmetric=true}", "int8", "int8{activations=static}")
CASES = [*((pipeline, True) for pipeline in PIPELINES), ("", False), ("int8", False)]
"""A bias stands behind the product, whatever the weight is: every form of weight with one, two forms without."""


def exported(bias: bool, pipeline: str, folder: Path) -> tuple[tokopt.Bundle, Path]:
    x = torch.randn(2, 5, 32)
    bundle = tokopt.capture(Projections(bias), (x,))
    bundle = tokopt.optimize(bundle, pipeline, calibration=[x])
    return bundle, tokopt.export(bundle, folder / "model.tokopt")


@pytest.mark.parametrize(("pipeline", "bias"), CASES)
def test_three_products_are_one(pipeline: str, bias: bool, tmp_path: Path) -> None:
    """Names and order of the outputs stay, whichever of them come from the split."""
    bundle, path = exported(bias, pipeline, tmp_path)
    graph = onnx.load(path / "forward.onnx", load_external_data=False).graph
    kinds = collections.Counter(node.op_type for node in graph.node)
    assert (kinds["MatMul"], kinds["Split"]) == (2, 1)
    assert kinds["Add"] == 1 + bias  # the biases are one too
    assert [value.name for value in graph.output] == [spec.name for spec in bundle.main.outputs]
    x = torch.randn(3, 5, 32)
    model = load(path, threads=1)
    for got, wanted in zip(model(x.numpy()).values(), bundle(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), wanted, atol=3e-2, rtol=1e-1)


def test_unlike_weights_stay_apart(tmp_path: Path) -> None:
    """Two of four bits and one of eight: two products, and export says why."""
    x = torch.randn(2, 5, 32)
    bundle = tokopt.capture(Projections(bias=True), (x,))
    bundle = tokopt.optimize(bundle, 'rtn{group=16 skip=["query"]},rtn{group=16 bits=8 only=["query"]}')
    assert [step.matches for step in bundle.history] == [3, 1]
    lines: list[str] = []
    path = tokopt.export(bundle, tmp_path / "model.tokopt", progress=lines.append)
    assert (
        "forward: products of one tensor with several weights as one product: 1 of 2; left 1: its weight is uint8 in "
        "blocks of 16, those of the products beside it are not (query)"
    ) in lines
    graph = onnx.load(path / "forward.onnx", load_external_data=False).graph
    assert [node.op_type for node in graph.node].count("MatMul") == 3
    types = {i.data_type for i in graph.initializer} & {onnx.TensorProto.UINT4, onnx.TensorProto.UINT8}
    assert types == {onnx.TensorProto.UINT4, onnx.TensorProto.UINT8}


class Scaled(nn.Module):
    """A factor per channel after a product (LayerScale), and factors that have to stay: other readers, one number."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(32, 32, bias=bias) for _ in range(3))
        self.factors = nn.Parameter(torch.randn(3, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.factors[0] * self.first(x)
        y = self.second(x)
        return x + y * self.factors[1] + y + 0.5 * self.third(x)


@pytest.mark.parametrize(("pipeline", "bias"), CASES)
def test_factors_move_into_weights(pipeline: str, bias: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 5, 32)
    bundle = tokopt.optimize(tokopt.capture(Scaled(bias), (x,)), pipeline, calibration=[x])
    path = tokopt.export(bundle, tmp_path / "model.tokopt")
    kinds = collections.Counter(node.op_type for node in onnx.load(path / "forward.onnx").graph.node)
    tokens = 2 if pipeline == "int8" else 0  # the scales of tokens: the last two products are one
    assert kinds["Mul"] == 2 + tokens
    assert tokopt.verify(path).ok


def test_layers_that_share_zero_points_may_be_merged_with_different_ones(tmp_path: Path) -> None:
    """Of two layers with equal weights, three products are one in the first, two in the second."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linears = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.linears[0](x) * self.linears[1](x) + self.linears[2](x)
            return self.linears[3](y[:, :1]) * self.linears[4](y) + self.linears[5](y)

    x = torch.randn(2, 5, 32)
    bundle = tokopt.optimize(tokopt.capture(Two(), (x,)), "int8{activations=static}", calibration=[x])
    assert tokopt.verify(tokopt.export(bundle, tmp_path / "model.tokopt")).ok


@pytest.mark.parametrize("pipeline", ["", "rtn{group=16}"])
def test_a_weight_may_stand_beside_different_ones(pipeline: str, tmp_path: Path) -> None:
    """One weight is read twice, each time with another one beside it."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.twice, self.first, self.second = (nn.Linear(32, 32, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.twice(x) * self.first(x)
            return self.twice(y) + self.second(y).sigmoid()

    bundle = tokopt.optimize(tokopt.capture(Tied(), (torch.randn(2, 5, 32),)), pipeline)
    assert tokopt.verify(tokopt.export(bundle, tmp_path / "model.tokopt")).ok
