"""The form of a program that calls tokopt's own CPU kernels, beside the portable one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from tokopt.ir.program import Program
from tokopt.kernels.cpu import DOMAIN, VERSION
from tokopt.lower.cpu.cached_attention import CachedAttention
from tokopt.lower.cpu.draw_tokens import DrawTokens
from tokopt.lower.cpu.expert_linear import ExpertLinear, FloatExpertLinear
from tokopt.lower.cpu.int8_linear import Int8Linear
from tokopt.lower.cpu.latest_repeat import LatestRepeat
from tokopt.lower.cpu.move_entries import MoveEntries
from tokopt.lower.cpu.quantized_linear import QuantizedLinear
from tokopt.lower.cpu.uniforms import Uniforms
from tokopt.lower.onnx.export import WeightFile
from tokopt.lower.onnx.rule import Outcome, apply_rule
from tokopt.lower.onnxruntime.attention import CONTRIB
from tokopt.lower.onnxruntime.norms import NormOfSum
from tokopt.lower.parity.check import check_parity
from tokopt.runtime.format.manifest import OWN


def lower_with_kernels(
    program: Program,
    path: Path,
    weights: WeightFile,
    *,
    alike: bool = False,
    check: bool = True,
    tolerance: float | None = None,
    original: Program | None = None,
    compared: Collection[str] | None = None,
    report: Callable[[Outcome], None] | None = None,
) -> Path | None:
    """Write the portable ``<name>.onnx`` at ``path`` with ops of tokopt's CPU kernels beside it, ``<name>.cpu.onnx``.

    ``weights`` is the file of weights of both, which holds the same codes once. ``alike`` is for a model that proposes
    tokens: the same bits for a token beside any number of others, in all of its programs. The result carries the bodies
    of the ops that it calls, and ``check`` compares what these bodies compute, in float32 arithmetic, with the program,
    or with ``original``, the program before it was cleaned up, in the outputs ``compared``. ``report`` is told what was
    fused and what was left.
    Returns None, and writes nothing, when there is nothing to fuse. Raises LoweringError when the two disagree.
    """
    model = ir.load(path)
    outcomes = fuse_for_kernels(model, program, alike=alike)
    for outcome in outcomes:
        if report is not None and outcome.candidates:
            report(outcome)
    if not any(outcome.fused for outcome in outcomes):
        return None
    weights.place_all(model.graph)
    target = path.with_suffix(f".{OWN}.onnx")
    ir.save(model, target)
    if check:
        check_parity(
            original or program,
            target,
            path.stem,
            lowered=program,
            tolerance=tolerance,
            names=compared,
            bodies=True,
        )
    return target


def fuse_for_kernels(model: ir.Model, program: Program, *, alike: bool = False) -> list[Outcome]:
    """Rewrite ``model`` in place; without something that becomes an op, nothing is changed."""
    attention = CachedAttention(model, program, alike=alike)
    outcomes = [
        apply_rule(ExpertLinear(model), model.graph),
        apply_rule(FloatExpertLinear(model), model.graph),
        apply_rule(QuantizedLinear(model), model.graph),
        apply_rule(Int8Linear(model), model.graph),
        apply_rule(DrawTokens(model), model.graph),
        apply_rule(Uniforms(model), model.graph),
        apply_rule(LatestRepeat(model), model.graph),
        apply_rule(MoveEntries(model), model.graph),
        apply_rule(attention, model.graph),
    ]
    if not any(outcome.fused for outcome in outcomes):
        return outcomes
    model.opset_imports[DOMAIN] = VERSION
    if outcomes[-1].fused:
        outcomes += [attention.rotations, apply_rule(NormOfSum(), model.graph)]
        model.opset_imports[CONTRIB] = 1
        model.graph.sort()
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedFunctionsPass()(model)
    return outcomes
