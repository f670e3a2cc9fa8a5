"""What no output reads is not computed, and outputs stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import tokopt
from tests.lower.encoders import CHANNELS, PATCHES, Vision
from tokopt.errors import LoweringError
from tokopt.ir.bundle import Bundle
from tokopt.ir.graph import SDPA, aten, is_call, results
from tokopt.ir.program import Program
from tokopt.kernels import declared
from tokopt.passes.cleanup import drop_unread as drop_unread_module
from tokopt.passes.cleanup.drop_unread import Dropped
from tokopt.rewrite.edit import call, close_graph, open_graph
from tokopt.runtime import load
from tokopt.runtime.format.manifest import read_manifest

TOKENS = PATCHES + 1


class Reading(nn.Module):
    """A part of the features of every token."""

    def __init__(self, read: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.encoder, self.read = Vision(), read
        self.norm, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 7)

    def forward(self, patches: Tensor) -> object:
        return self.read(self.head(self.norm(self.encoder(patches)["tokens"])))


def first(x: Tensor) -> Tensor:
    return x[:, 0]


@cache
def captured(read: Callable[[Tensor], object]) -> Bundle:
    torch.manual_seed(0)
    return tokopt.capture(Reading(read).eval(), (torch.randn(3, PATCHES, 12),))


def drop_unread(bundle: Bundle) -> Program:
    """What the pass makes of the bundle's program."""
    return tokopt.optimize(bundle, "drop_unread").main


def rows(program: Program) -> list[int]:
    """Tokens that every linear and every attention computes, in order."""
    nodes = program.module.graph.nodes
    return [node.meta["val"].shape[-2] for node in nodes if is_call(node, aten.linear, SDPA)]


WHOLE = [PATCHES] + 2 * [TOKENS] * 5 + [TOKENS]


@pytest.mark.parametrize(
    ("read", "count"),
    [
        (first, 1),
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
    bundle = captured(read)
    program, narrow = bundle.main, drop_unread(bundle)
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
    bundle = captured(read)
    made = tokopt.optimize(bundle, "drop_unread")
    assert made.main is bundle.main
    assert made.history[-1].matches == 0 and made.history[-1].notes == ("everything is read",)


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
    bundle = tokopt.capture(Masked().eval(), (torch.randn(3, 9, 8),))
    program, narrow = bundle.main, drop_unread(bundle)
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

    bundle = tokopt.capture(Causal().eval(), (torch.randn(3, 9, 8),))
    program, narrow = bundle.main, drop_unread(bundle)
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
    made = tokopt.optimize(captured(first), pipeline)
    program, narrow = made.main, drop_unread(made)
    assert len(chosen(program)) == 2 + pipeline.count(",") and len(chosen(narrow)) == 1
    assert rows(narrow)[-4:] == [1] * 4
    torch.testing.assert_close(narrow(*program.example), program(*program.example))


def chosen(program: Program) -> list[object]:
    return [n for n in program.module.graph.nodes if (op := declared(n.target)) and op.choice]


def test_what_was_dropped_once_is_not_dropped_again() -> None:
    bundle = tokopt.optimize(captured(first), "tome{r=4}")
    once = tokopt.optimize(bundle, "drop_unread")
    assert once.history[-1].matches == 6 and once.semantics == bundle.semantics
    assert once.history[-1].notes == (
        "forward: linears and attentions that compute only what is read of them: 5",
        "forward: reductions left out, of which only protected tokens are read: 1",
    )
    twice = tokopt.optimize(once, "drop_unread")
    assert twice.main is once.main and twice.history[-1].matches == 0


def test_a_reduction_of_which_only_protected_tokens_are_read_is_left_out_where_no_product_follows() -> None:
    bundle = tokopt.capture(Vision().eval(), (torch.randn(3, PATCHES, 12),))
    made = tokopt.optimize(bundle, "evit{r=4 fuse=false layers=[1]}")
    pooled = replace(made.main.outputs[1], name="pooled")
    module = open_graph(made.main)
    output = module.graph.output_node()
    output.args = ((output.args[0][1],),)  # type: ignore[index]
    made = made.with_program("forward", close_graph(made.main, module, outputs=(pooled,)))
    narrow = drop_unread(made)
    assert len(chosen(made.main)) == 1 and not chosen(narrow)
    torch.testing.assert_close(narrow(*narrow.example), made.main(*narrow.example))


@pytest.mark.parametrize("reductions", ["tome{r=4}", "tome{r=2},evit{r=2 fuse=false}"])
def test_token_reductions_may_come_after_it(reductions: str) -> None:
    """They reduce what they would have reduced without it, and it drops again."""
    bundle = captured(first)
    leading, *rest = reductions.split(",")
    orders = [
        ",".join(("drop_unread", leading, *rest, "drop_unread")),
        ",".join((leading, "drop_unread", *rest, "drop_unread")),
    ]
    wanted = drop_unread(tokopt.optimize(bundle, reductions))
    for text in orders:
        made = tokopt.optimize(bundle, text).main
        assert rows(made) == rows(wanted)
        torch.testing.assert_close(made(*made.example), wanted(*made.example), rtol=0, atol=0)


def test_only_programs_that_the_schedule_enters_are_changed() -> None:
    bundle = captured(first)
    beside = replace(bundle, programs={**bundle.programs, "beside": bundle.main})
    made = tokopt.optimize(beside, "drop_unread")
    assert made.programs["beside"] is bundle.main and made.main is not bundle.main


def test_export_runs_it_and_says_so_where_it_changed_something(tmp_path: Path) -> None:
    """The bundle stays as it was, and so does one that is kept for further passes."""
    said: list[str] = []
    bundle = captured(first)
    path = tokopt.export(bundle, tmp_path / "first.tokopt", progress=said.append)
    manifest = read_manifest(path)
    assert manifest.pipeline == "drop_unread" and manifest.semantics == "exact"
    assert [(step.text, step.matches) for step in manifest.passes] == [("drop_unread", 5)]
    assert f"drop_unread: {manifest.passes[0].notes[0]}" in said
    assert not bundle.history
    done = tokopt.optimize(bundle, "drop_unread")
    again = read_manifest(tokopt.export(done, tmp_path / "again.tokopt", check=False))
    assert again.passes == manifest.passes
    whole = tokopt.export(captured(lambda x: x), tmp_path / "whole.tokopt", check=False)
    kept = tokopt.export(bundle, tmp_path / "kept.tokopt", target="torch")
    assert not read_manifest(whole).passes and not read_manifest(kept).passes


@pytest.mark.parametrize(
    ("pipeline", "between"),
    [
        ("", "ONNX Runtime and the exported program"),
        ("tome{r=4}", "the program before and after its cleanup"),
    ],
)
def test_a_wrong_cleanup_is_not_written(
    pipeline: str, between: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is exported is compared with the program before cleanup, also where that chose tokens that nobody reads."""

    def another(program: Program) -> Dropped:
        """Drop what is not read, and give the rest the wrong sign."""
        dropped = right(program)
        assert dropped is not None
        module = open_graph(dropped.program)
        output = module.graph.output_node()
        (given,) = results(module.graph)
        with module.graph.inserting_before(output):
            output.args = ((call(module.graph, torch.neg, given, like=given),),)
        return replace(dropped, program=close_graph(dropped.program, module))

    right = drop_unread_module.drop
    monkeypatch.setattr(drop_unread_module, "drop", another)
    bundle = tokopt.optimize(captured(first), pipeline)
    with pytest.raises(LoweringError, match=f"differs between {between}"):
        tokopt.export(bundle, tmp_path / "model.tokopt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pipeline", ["", "tome{r=[4,0]}", "tome{r=[4,0]},int8", "int8{activations=static}"])
def test_artifact_computes_what_is_read(pipeline: str, tmp_path: Path) -> None:
    bundle = captured(first)
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
