"""Does a lowered program compute what the exported program computes? Compared by NMSE per output."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from tokopt.errors import LoweringError
from tokopt.ir.program import Program
from tokopt.lower.parity.precision import all_alike, half_precision_limit, rounds_alike
from tokopt.lower.parity.selections import (
    expose_selections,
    run_alike,
    run_in_float64_with_selections,
    run_with_selections,
    selection_shapes,
    selects,
)
from tokopt.lower.parity.together import run_together
from tokopt.runtime.buffers import run_in_place
from tokopt.runtime.engines.onnxruntime import UNFOLDED
from tokopt.runtime.numerics import SELFTEST_LIMITS, OutputCheck, check_output
from tokopt.runtime.selftest import compared

ACTIVATIONS = "session.qdq_matmulnbits_accuracy_level"
"""How ONNX Runtime multiplies with block-quantized weights: 1 in float32, 4 with activations of 8 bits."""

LOGITS = 16.0
"""How large logits are. A log-probability is the difference of two, and has their rounding however small it is."""

Example = tuple[torch.Tensor, ...]


def check_parity(
    program: Program,
    path: Path,
    name: str,
    *,
    lowered: Program | None = None,
    tolerance: float | None = None,
    names: Collection[str] | None = None,
    shared: Mapping[str, str] | None = None,
    bodies: bool = False,
) -> None:
    """Compare the ONNX file at ``path`` with ``program`` on the example and other sizes of its named axes.

    Where both are as far from the program's float64 values, they agree as well as float32 can (see
    :mod:`tokopt.lower.parity.precision`). Where the program chooses tokens and rounding alone made the two choose
    differently, they are compared again with the same choice (see :mod:`tokopt.lower.parity.selections`). ``lowered``
    is the program that the file was made of, where that is ``program`` cleaned up. ``tolerance`` replaces the largest
    NMSE that the dtype of an output allows. ``names`` are the outputs that have to agree, by default those that a
    self-test of a bundle without states would compare. ``shared`` (``{output: input}``) are caches written in place.
    ``bodies`` says that the file is another one, compared in all sizes, with calls of ops whose bodies it holds: the
    example is enough, and weights are expanded when they are multiplied, since together they may not fit into memory.
    Raises LoweringError naming the output, its NMSE and the sizes.
    """
    sized = list(islice(resized_examples(program), 1 if bodies else None))
    made = run_together(program.module, [inputs for _, inputs in sized])
    session = _session(path, name, unfolded=bodies)
    tolerance = half_precision_limit(program) if tolerance is None else tolerance
    names = compared(program.outputs, ()) if names is None else names
    wanted = _Wanted(program, names, tolerance)
    for (sizes, inputs), expected in zip(sized, made, strict=True):
        if isinstance(expected, Exception):
            if inputs is program.example:
                raise expected
            continue  # the exported program refuses these sizes, so nothing is promised for them
        where = f"program {name!r}{sizes}"
        actual = _run(session, program, inputs, where, shared=shared or {})
        faults = _faults(wanted, expected, actual)
        fault = _first(faults)
        if fault and selects(program):
            chooser = replace(wanted, program=_chooser(program, lowered or program))
            fault = _cleanup_fault(wanted, chooser.program, inputs) or _fault_given_selections(
                chooser, path, name, inputs, shared or {}, unfolded=bodies
            )
        if fault and tolerance is None and rounds_alike(program, inputs, expected, actual, faults):
            continue
        if fault:
            raise LoweringError(
                f"{where}: {fault}; if the example inputs of capture are noise, give it real ones, else report "
                "it, or pass check=False"
            )


def check_rewritten(program: Program, portable: Path, rewritten: Path, limit: float | None) -> None:
    """Compare two ONNX files of ``program`` on its example, both on ONNX Runtime.

    ``limit`` is the largest NMSE, by default what the dtype of an output allows, or more where rounding may choose
    other tokens or steps. Raises LoweringError naming the output and its NMSE.
    """
    where = f"program {portable.stem!r}"
    if limit is None:
        limit = SELFTEST_LIMITS["approximate"] if selects(program) else half_precision_limit(program)
    # Unfused, since TensorRT's bytes are signed, whose products saturate on processors without VNNI.
    sessions = _session(portable, portable.stem), _session(rewritten, portable.stem, {_UNFUSED: "1"})
    wanted, actual = (_run(session, program, program.example, where) for session in sessions)
    for spec, want, got in zip(program.outputs, wanted, actual, strict=True):
        check = check_output(spec.name, want, got, limit)
        if not check.ok:
            raise LoweringError(
                f"{where}: output {spec.name!r} of the graph for TensorRT differs from the portable one: NMSE "
                f"{check.nmse:.2g}, at most {check.limit:.2g} is allowed; report it, or pass check=False"
            )


@dataclass(frozen=True)
class _Wanted:
    """What a lowered program has to give: the outputs ``names`` of a program, as close as ``tolerance`` says."""

    program: Program
    names: Collection[str]
    tolerance: float | None


def _faults(
    wanted: _Wanted, expected: Sequence[torch.Tensor], actual: Sequence[np.ndarray]
) -> dict[str, OutputCheck]:
    """The outputs that differ by more than their dtype allows."""
    checks: dict[str, OutputCheck] = {}
    for spec, want, got in zip(wanted.program.outputs, expected, actual, strict=True):
        sides = want.numpy(force=True), got
        if spec.role == "logprobs":
            sides = sides[0] - LOGITS, sides[1] - LOGITS
        checks[spec.name] = check_output(spec.name, *sides, wanted.tolerance)
    return {name: check for name, check in checks.items() if name in wanted.names and not check.ok}


def _first(faults: Mapping[str, OutputCheck]) -> str | None:
    """The first of the outputs that differ, in words."""
    for check in faults.values():
        return (
            f"output {check.name!r} differs between ONNX Runtime and the exported program: NMSE "
            f"{check.nmse:.2g}, at most {check.limit:.2g} is allowed"
        )
    return None


def _chooser(program: Program, lowered: Program) -> Program:
    """The program that runs under the selections of the ONNX form: ``program`` where it makes the same ones.

    A cleanup drops selections that nobody reads and narrows others to the tokens that are read. What ONNX Runtime chose
    then says nothing about the rest of the original's choices, and only the cleaned program can run under it.
    """
    return program if selection_shapes(program) == selection_shapes(lowered) else lowered


def _cleanup_fault(wanted: _Wanted, lowered: Program, inputs: Example) -> str | None:
    """The first output or selection that a cleanup changed by more than a few other choices do.

    Both programs choose alike, but where the cleanup left fewer tokens to choose from: there it could hide behind the
    limit of what other choices do.
    """
    if lowered is wanted.program:
        return None
    expected, made, selections = run_alike(wanted.program, lowered, inputs)
    for selection in selections:
        if not selection.ok:
            return (
                f"{selection.name} chooses differently for {selection.different} of {selection.tokens} tokens "
                "before and after the program's cleanup"
            )
    limit = max(SELFTEST_LIMITS["approximate"] or 0.0, wanted.tolerance or 0.0)
    for spec, want, got in zip(wanted.program.outputs, expected, made, strict=True):
        check = check_output(spec.name, want.numpy(force=True), got.numpy(force=True), limit)
        if not check.ok:
            return (
                f"output {spec.name!r} differs between the program before and after its cleanup: NMSE "
                f"{check.nmse:.2g}, at most {check.limit:.2g} is allowed"
            )
    return None


def _fault_given_selections(
    wanted: _Wanted, path: Path, name: str, inputs: Example, shared: Mapping[str, str], *, unfolded: bool
) -> str | None:
    """The first output or selection that still differs when both forms choose the same tokens."""
    program = wanted.program
    copy, names = expose_selections(path)
    try:
        session = _session(copy, name, unfolded=unfolded)
    finally:
        copy.unlink()
    every = [value.name for value in session.get_outputs()]
    found = dict(zip(every, _run(session, program, inputs, f"program {name!r}", every, shared), strict=True))
    given = [[found[output] for output in outputs] for outputs in names]
    expected, selections = run_with_selections(program, inputs, given)
    for selection in selections:
        if not selection.ok:
            return (
                f"{selection.name} chooses differently for {selection.different} of {selection.tokens} tokens "
                "in ONNX Runtime and the exported program"
            )
    actual = [found[spec.name] for spec in program.outputs]
    faults = _faults(wanted, expected, actual)
    if faults and wanted.tolerance is None:
        try:
            exact = run_in_float64_with_selections(program, inputs, given)
        except Exception:  # an op of the program that knows no float64
            return _first(faults)
        return None if all_alike(program, exact, expected, actual, faults) else _first(faults)
    return _first(faults)


def resized_examples(program: Program) -> Iterator[tuple[str, Example]]:
    """The example, then copies in which one named axis has its smallest size, or one less (or more).

    Each comes with its sizes in words.
    """
    sizes = {
        axis: size
        for spec, tensor in zip(program.inputs, program.example, strict=True)
        for axis, size in zip(spec.axes, tensor.shape, strict=True)
        if isinstance(axis, str)
    }
    yield _words(sizes), program.example
    for axis, old in sizes.items():
        bounds = program.ranges[axis]
        low, high = max(bounds.min, 1), old + 1 if bounds.max is None else bounds.max
        near = old - 1 if old > low else old + 1
        for size in sorted({low, near} - {old}):
            if size <= high:
                yield _words({**sizes, axis: size}), resized(program, axis, size)


def resized(program: Program, axis: str, size: int) -> Example:
    """The example with ``axis`` cut to ``size``, or grown by starting again."""
    result = []
    for spec, tensor in zip(program.inputs, program.example, strict=True):
        for i, name in enumerate(spec.axes):
            if name == axis:
                tensor = tensor.index_select(i, torch.arange(size) % tensor.shape[i])
        result.append(tensor)
    return tuple(result)


def _words(sizes: dict[str, int]) -> str:
    return " (" + ", ".join(f"{axis} {size}" for axis, size in sizes.items()) + ")" if sizes else ""


_UNFUSED = "session.disable_quant_qdq"
"""Whether quantized products are computed in float."""


def _session(
    path: Path, name: str, entries: Mapping[str, str] | None = None, *, unfolded: bool = False
) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # what fails is raised
    settings.enable_cpu_mem_arena = not unfolded  # it keeps what expanded weights took, and takes it doubled
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch uses the same cores
    settings.add_session_config_entry(ACTIVATIONS, "1")  # in float: what is compared is the program
    for entry in (entries or {}).items():
        settings.add_session_config_entry(*entry)
    try:
        return onnxruntime.InferenceSession(
            path,
            settings,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=UNFOLDED if unfolded else None,
        )
    except Exception as error:  # ONNX Runtime raises several unrelated classes
        raise LoweringError(
            f"ONNX Runtime cannot load program {name!r}: {_line(error)}; report it"
        ) from error


def _run(
    session: onnxruntime.InferenceSession,
    program: Program,
    inputs: Example,
    where: str,
    outputs: Sequence[str] | None = None,
    shared: Mapping[str, str] | None = None,
) -> list[np.ndarray]:
    """The values of ``outputs``, by default those of the program."""
    outputs = outputs or [spec.name for spec in program.outputs]
    feed = {spec.name: tensor.numpy(force=True) for spec, tensor in zip(program.inputs, inputs, strict=True)}
    try:
        return run_in_place(session, outputs, feed, shared or {})
    except Exception as error:  # ONNX Runtime raises several unrelated classes
        raise LoweringError(f"ONNX Runtime fails on {where}: {_line(error)}; report it") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
