"""The form of a program that ONNX Runtime's CPU kernels run fastest, beside the portable one.

It takes one row, since ONNX Runtime accepts several new tokens for a batch of one only, and a mask in which no new
token sees a later one (causal, or a tree whose nodes come after their parents), since its kernel for attention hides
later tokens whatever the mask says. For everything else a host has the portable form.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from tokopt.ir.program import AxisRange, Program
from tokopt.lower.onnx.rule import Outcome, apply_rule
from tokopt.lower.onnxruntime.attention import CONTRIB, AttentionOverCache
from tokopt.lower.onnxruntime.norms import NormOfSum
from tokopt.lower.parity.check import check_parity, resized
from tokopt.runtime.format.signature import find_role


def lower_for_cpu(
    program: Program,
    path: Path,
    *,
    check: bool = True,
    tolerance: float | None = None,
    original: Program | None = None,
    compared: Collection[str] | None = None,
    report: Callable[[Outcome], None] | None = None,
) -> Path | None:
    """Write the fused form of the portable ``<name>.onnx`` at ``path`` beside it, as ``<name>.onnxruntime.onnx``.

    Its weights are those of the portable form. ``check`` compares it with the exported program for a batch of one,
    or with ``original``, the program before it was cleaned up, in the outputs ``compared``. ``report`` is told what
    every fusion did and left.
    Returns None, and writes nothing, when there is nothing to fuse. Raises LoweringError when the two disagree.
    """
    model = ir.load(path)
    outcomes = fuse_for_cpu(model, program)
    for outcome in outcomes:
        if report is not None and outcome.candidates:
            report(outcome)
    if not any(outcome.fused for outcome in outcomes):
        return None
    fused = path.with_suffix(".onnxruntime.onnx")
    ir.save(model, fused)
    if check:
        check_parity(
            one_row(original or program),
            fused,
            path.stem,
            lowered=one_row(program),
            tolerance=tolerance,
            names=compared,
            shared=program.aliases,
        )
    return fused


def one_row(program: Program) -> Program:
    """The program for a batch of one."""
    return replace(
        program,
        example=resized(program, "batch", 1),
        ranges={**program.ranges, "batch": AxisRange(1, 1)},
    )


def fuse_for_cpu(model: ir.Model, program: Program) -> list[Outcome]:
    """Rewrite ``model`` in place; where no attention can be fused, nothing is changed."""
    rule = AttentionOverCache(model.graph, program.aliases, _causal_input(program))
    attention = apply_rule(rule, model.graph)
    if not attention.fused:
        return [attention]
    norms = apply_rule(NormOfSum(), model.graph)
    model.graph.sort()
    model.opset_imports[CONTRIB] = 1
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedFunctionsPass()(model)
    return [attention, rule.rotations, norms]


def _causal_input(program: Program) -> str | None:
    """The input that hosts have to look at before they run this form; its example must be of the kind that it takes."""
    mask = find_role(program.inputs, "mask")
    if mask is None or program.example[program.inputs.index(mask)].triu(1).any():
        return None
    return mask.name
