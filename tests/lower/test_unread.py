"""What no output reads is not computed, and outputs stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import tokopt
from tests.lower.encoders import CHANNELS, PATCHES, Vision
from tokopt.ir.bundle import Bundle
from tokopt.ir.graph import SDPA, aten, is_call
from tokopt.ir.program import Program
from tokopt.kernels import declared
from tokopt.lower.onnx.unread import drop_unread
from tokopt.runtime import load

TOKENS = PATCHES + 1


class Reading(nn.Module):
    """A part of the features of every token."""

    def __init__(self, read: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.encoder, self.read = Vision(), read
        self.norm, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 7)

    def forward(self, patches: Tensor) -> object:
        return self.read(self.head(self.norm(self.encoder(patches)["tokens"])))


def captured(read: Callable[[Tensor], object]) -> Bundle:
    torch.manual_seed(0)
    return tokopt.capture(Reading(read).eval(), (torch.randn(3, PATCHES, 12),))


def rows(program: Program) -> list[int]:
    """Tokens that every linear and every attention computes, in order."""
    nodes = program.module.graph.nodes
    return [node.meta["val"].shape[-2] for node in nodes if is_call(node, aten.linear, SDPA)]


WHOLE = [PATCHES] + 2 * [TOKENS] * 5 + [TOKENS]


@pytest.mark.parametrize(
    ("read", "count"),
    [
        (lambda x: x[:, 0], 1),
        (lambda x: x[:, -1], 1),
        (lambda x: x[:, :3].mean(1), 3),
        (lambda x: x[:, 2:-1].flatten(1), TOKENS - 3),
        (lambda x: (x[:, 1], x[:, 4:6]), 5),
        (lambda x: x[:1, 0], 1),
    ],
    ids=["first", "last", "leading", "middle", "two", "one row"],
)
def test_last_block_computes_what_is_read(read: Callable[[Tensor], object], count: int) -> None:
    """Keys and values of all tokens stay; queries come with them in one product, the rest is narrowed."""
    program = captured(read).main
    narrow = drop_unread(program)
    assert rows(program) == WHOLE
    assert rows(narrow) == WHOLE[:7] + [count] * 5
    for got, wanted in zip(narrow(*program.example), program(*program.example), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "read",
    [lambda x: x, lambda x: x.mean(1), lambda x: (x, x[:, 0]), lambda x: x[..., :3], lambda x: x[:, ::2]],
    ids=["all", "mean", "all and first", "channels", "stride"],
)
def test_what_is_read_whole_is_left_alone(read: Callable[[Tensor], object]) -> None:
    program = captured(read).main
    assert drop_unread(program) is program


def test_an_attention_mask_loses_the_same_rows() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
            self.mask = nn.Parameter(torch.randn(1, 1, 9, 9))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x)[:, None].chunk(3, -1)
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
            return self.out(x + y[:, 0])[:, 2]

    torch.manual_seed(0)
    program = tokopt.capture(Masked().eval(), (torch.randn(3, 9, 8),)).main
    narrow = drop_unread(program)
    assert rows(narrow) == [9, 1, 1]
    torch.testing.assert_close(narrow(*program.example), program(*program.example))


def test_causal_attention_is_left_alone() -> None:
    """Its rows are counted from the first query."""

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
            return self.out(y)[:, 3]

    program = tokopt.capture(Causal().eval(), (torch.randn(3, 9, 8),)).main
    narrow = drop_unread(program)
    assert rows(narrow) == [9, 1]
    torch.testing.assert_close(narrow(*program.example), program(*program.example))


@pytest.mark.parametrize(
    "pipeline",
    [
        "tome{r=4}",
        "pitome{r=4}",
        "evit{r=4 fuse=false}",
        "kcenter{r=4}",
        "tome{r=3},evit{r=2 layers=[1] fuse=false}",
    ],
)
def test_reductions_that_nobody_sees_are_left_out(pipeline: str) -> None:
    """After the last block's attention only the class token matters, which no reduction touches."""
    made = tokopt.optimize(captured(lambda x: x[:, 0]), pipeline)
    program, narrow = made.main, drop_unread(made.main)
    assert len(chosen(program)) == 2 + pipeline.count(",") and len(chosen(narrow)) == 1
    assert rows(narrow)[-4:] == [1] * 4
    torch.testing.assert_close(narrow(*program.example), program(*program.example))


def chosen(program: Program) -> list[object]:
    return [n for n in program.module.graph.nodes if (op := declared(n.target)) and op.choice]


@pytest.mark.parametrize("pipeline", ["", "tome{r=[4,0]}", "tome{r=[4,0]},int8", "int8{activations=static}"])
def test_artifact_computes_what_is_read(pipeline: str, tmp_path: Path) -> None:
    bundle = captured(lambda x: x[:, 0])
    inputs = bundle.main.example[0]
    made = tokopt.optimize(bundle, pipeline, calibration=[inputs])
    path = tokopt.export(made, tmp_path / "model.tokopt")
    assert tokopt.verify(path).ok
    wanted = made(inputs)[0].numpy()
    np.testing.assert_allclose(load(path)(inputs.numpy()), wanted, atol=2e-2 if "int8" in pipeline else 1e-5)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path / "forward.onnx"), strict_mode=True)
    sizes = {value.name: value.type.tensor_type.shape.dim for value in inferred.graph.value_info}
    attentions = [node for node in inferred.graph.node if node.op_type == "Attention"]
    assert [sizes[node.output[0]][2].dim_value for node in attentions] == [TOKENS, 1]
