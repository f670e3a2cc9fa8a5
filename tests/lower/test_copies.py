"""How many forms of its weights an export holds at a time: counted, since memory is not measured in tests."""

from __future__ import annotations

import json
import operator
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import tokopt
from tokopt.ir import memory
from tokopt.ir.program import Program
from tokopt.kernels import ops
from tokopt.lower.onnx import export as lowering
from tokopt.lower.onnx.rule import Outcome, apply_rule
from tokopt.lower.parity.check import resized_examples
from tokopt.lower.parity.together import run_together
from tokopt.rewrite.edit import open_graph
from tokopt.runtime.engines.onnxruntime import UNFOLDED

LAYERS = 3


class Gated(nn.Module):
    """x [batch, tokens, 64] through layers of two products of one tensor, and a third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleList((nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64))) for _ in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        for up, gate, down in self.layers:  # type: ignore[misc]
            x = x + down(up(x) * gate(x).sigmoid())
        return x


@cache
def quantized() -> tokopt.Bundle:
    axes = {"x": ("batch", "tokens", None)}
    return tokopt.optimize(tokopt.capture(Gated(), (torch.randn(2, 5, 64),), dynamic=axes), "rtn{bits=4}")


class Counted:
    """``dequantize_weight`` that counts its calls, and the most results that were there at a time."""

    def __init__(self) -> None:
        self.calls = self.alive = self.most = 0

    def __call__(self, *given: Any) -> Tensor:
        made = ops.dequantize_weight(*given)
        self.calls += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(made, self._gone)
        return made

    def _gone(self) -> None:
        self.alive -= 1


def counting(program: Program) -> tuple[GraphModule, Counted]:
    """The graph, whose weights are expanded by what counts."""
    module, counted = open_graph(program), Counted()
    for node in module.graph.nodes:
        if "dequantize_weight" in str(node.target) and node.op == "call_function":
            node.target = counted
    module.recompile()
    return module, counted


def test_a_weight_is_expanded_once_for_all_sizes_and_no_two_are_expanded_at_a_time() -> None:
    module, counted = counting(quantized().main)
    sized = [inputs for _, inputs in resized_examples(quantized().main)]
    assert len(sized) > 2
    run_together(module, sized)
    assert (counted.calls, counted.most, counted.alive) == (3 * LAYERS, 1, 0)


def test_programs_computed_together_give_what_each_gives_alone() -> None:
    program = quantized().main
    sized = [inputs for _, inputs in resized_examples(program)]
    for inputs, made in zip(sized, run_together(program.module, sized), strict=True):
        assert not isinstance(made, Exception)
        assert all(map(torch.equal, made, program(*inputs)))


def test_sizes_that_a_program_refuses_are_an_error_of_their_own() -> None:
    program = quantized().main
    good, bad = torch.randn(2, 5, 64), torch.randn(2, 5, 63)
    first, second, third = run_together(program.module, [(good,), (bad,), (good + 1,)])
    assert isinstance(second, Exception) and isinstance(first, tuple) and isinstance(third, tuple)
    assert torch.equal(third[0], program(good + 1)[0])


def test_no_form_of_a_weight_outlives_the_one_that_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest, seen = 128 * 64, list[int]()

    def watched(rule: Any, graph: ir.Graph) -> Outcome:
        done = apply_rule(rule, graph)
        large = [one for one in graph.initializers.values() if one.const_value.size >= largest]  # type: ignore[union-attr]
        assert all(one.uses() for one in large), f"{rule.name} leaves weights that nothing reads"
        seen.append(sum(one.const_value.size for one in large))  # type: ignore[union-attr]
        return done

    monkeypatch.setattr(lowering, "apply_rule", watched)
    tokopt.export(quantized(), tmp_path / "gated.tokopt", check=False)
    assert set(seen) == {3 * LAYERS * largest}


def test_bodies_expand_a_weight_right_before_its_product(tmp_path: Path) -> None:
    path = tokopt.export(quantized(), tmp_path / "gated.tokopt")
    settings = onnxruntime.SessionOptions()
    settings.enable_profiling, settings.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(
        path / "forward.cpu.onnx", settings, disabled_optimizers=UNFOLDED, providers=["CPUExecutionProvider"]
    )
    session.run(None, {"x": torch.randn(2, 5, 64).numpy()})
    events = [
        event for event in json.loads(Path(session.end_profiling()).read_text()) if event.get("cat") == "Node"
    ]
    order = [event["args"]["op_name"] for event in sorted(events, key=operator.itemgetter("ts"))]
    order = [name for name in order if name == "BitShift" or "MatMul" in name]
    assert ["BitShift" if name == "BitShift" else "product" for name in order] == [
        "BitShift",
        "product",
    ] * 2 * LAYERS


def test_memory_is_given_back_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    memory.trim()
    memory._trimmer.cache_clear()  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())  # no malloc_trim
    memory.trim()
    memory._trimmer.cache_clear()  # pyright: ignore[reportPrivateUsage]
