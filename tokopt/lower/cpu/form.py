"""The form of a program that calls tokopt's own CPU kernels, beside another one that calls ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from tokopt.ir.program import Program
from tokopt.kernels.cpu import DOMAIN, VERSION
from tokopt.lower.cpu.int8_linear import Int8Linear
from tokopt.lower.cpu.quantized_linear import QuantizedLinear
from tokopt.lower.onnx.export import WeightFile
from tokopt.lower.onnx.rule import Outcome, apply_rule
from tokopt.lower.onnxruntime.cpu import one_row
from tokopt.lower.parity.check import check_parity
from tokopt.runtime.format.manifest import ONE_ROW, WITH_KERNELS


def lower_with_kernels(
    program: Program,
    path: Path,
    name: str,
    form: str,
    weights: WeightFile,
    *,
    check: bool = True,
    tolerance: float | None = None,
    original: Program | None = None,
    report: Callable[[Outcome], None] | None = None,
) -> Path | None:
    """Write the ONNX file at ``path``, a form of program ``name``, with ops of tokopt's CPU kernels beside it.

    ``weights`` is the file of weights of both, which holds the same codes once. The result carries the bodies of the
    ops that it calls, and ``check`` compares what these bodies compute, in float32 arithmetic, with the program, or
    with ``original``, the program before it was cleaned up. ``report`` is told what was fused and what was left.
    Returns None, and writes nothing, when there is nothing to fuse. Raises LoweringError when the two disagree.
    """
    model = ir.load(path)
    outcomes = apply_rule(QuantizedLinear(model), model.graph), apply_rule(Int8Linear(model), model.graph)
    for outcome in outcomes:
        if report is not None and outcome.candidates:
            report(outcome)
    if not any(outcome.fused for outcome in outcomes):
        return None
    model.opset_imports[DOMAIN] = VERSION
    passes.RemoveUnusedNodesPass()(model)
    weights.place_all(model.graph)
    target = path.with_name(f"{name}.{WITH_KERNELS[form]}.onnx")
    ir.save(model, target)
    if check:
        cut, shared = (one_row, program.aliases) if form == ONE_ROW else (_as_it_is, {})
        check_parity(
            cut(original or program),
            target,
            name,
            lowered=cut(program),
            tolerance=tolerance,
            shared=shared,
            bodies=True,
        )
    return target


def _as_it_is(program: Program) -> Program:
    return program
