"""The self-test of an artifact: stored inputs, what the exported programs gave for them, and how far off is fine.

Engines multiply weights of 4 or 8 bits with activations that they round to 8 bits, each processor by kernels of its
own, and a program that chooses tokens may then choose others. So there are two questions, and every processor answers
both alike:

- Does the artifact compute its programs? In float32 arithmetic, where only the order of sums differs, every output
  (the states too) is compared by its NMSE. This finds a single wrong scale.
- Does this engine run it well enough? With the engine's own arithmetic, what callers see is compared in the terms of
  the task: the KL divergence of predictions, the cosine of features.

Where the engine's own arithmetic already gives every output within the limits of float32, both are answered.
"""

# safetensors leaves the types of paths open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from tokopt.errors import ArtifactError, TokoptError
from tokopt.runtime.engines.base import Programs
from tokopt.runtime.format.manifest import PORTABLE, Manifest, ProgramEntry, file_path
from tokopt.runtime.format.signature import BATCH, Tensor, TensorLike
from tokopt.runtime.format.state import State
from tokopt.runtime.numerics import (
    LIMITS,
    SELFTEST_LIMITS,
    OutputCheck,
    agreement,
    check_output,
    cosines,
    divergences,
)

LOOSEST = 0.5
"""No limit of an NMSE is above this: an output of zeros has 1."""

KL, COSINE = "KL divergence", "cosine distance"
"""Measures of a :class:`TaskCheck`, means over all vectors: of logits in nats, and of all outputs 1 - cosine.

The divergence of predictions that are nearly uniform is small whatever they say, and their cosine is not.
"""

TASK_LOOSEST: Mapping[str, float] = {KL: 2.0, COSINE: 0.5}
"""No limit of a task's measure is above this."""


@dataclass(frozen=True)
class SelfTest:
    """What is stored of one program, by the names of its inputs and outputs.

    ``limits`` are the largest NMSE of outputs in float32 arithmetic, ``task_limits`` the largest values of each measure
    of the task; what an older version did not store is missing.
    """

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    limits: Mapping[str, float] = field(default_factory=dict[str, float])
    task_limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])


@dataclass(frozen=True)
class TaskCheck:
    """One output as the engine computes it, in the terms of the task.

    ``measure`` is :data:`KL` or :data:`COSINE`. ``agreement`` is the share of predictions whose likeliest token is the
    same, None for what is no prediction.
    """

    name: str
    measure: str
    value: float
    limit: float
    agreement: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the engine's arithmetic costs no more than is allowed; false for NaN."""
        return self.value <= self.limit


@dataclass(frozen=True)
class FormChecks:
    """What the self-test of one form of a program found.

    ``tasks`` is empty where ``outputs`` are those of the engine's own arithmetic.
    """

    outputs: tuple[OutputCheck, ...]
    tasks: tuple[TaskCheck, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return all(check.ok for check in (*self.outputs, *self.tasks))


def run_selftests(
    folder: Path, manifest: Manifest, opened: Callable[[], Programs]
) -> dict[str, tuple[OutputCheck | TaskCheck, ...]]:
    """All checks of every form of every program; see :func:`check_forms`."""
    tests = {name: read_selftest(folder, manifest, name) for name in manifest.programs}
    return {
        key: (*found.outputs, *found.tasks) for key, found in check_forms(manifest, tests, opened).items()
    }


def check_forms(
    manifest: Manifest, tests: Mapping[str, SelfTest], opened: Callable[[], Programs]
) -> dict[str, FormChecks]:
    """Run every form of every program on its stored inputs and compare every output with the one stored.

    The key is the program's name, for another form than the portable one with that form's name: ``step.onnxruntime``,
    which runs one row of the stored batch. ``opened`` is called once per form, so that what it opens can be dropped
    before the next. Raises TokoptError when the engine fails on the inputs.
    """
    return {
        key: _check_form(manifest, name, form, tests[name], opened())
        for key, name, form in _forms(manifest, opened())
    }


def _forms(manifest: Manifest, programs: Programs) -> Iterator[tuple[str, str, str]]:
    """Key, program and form of everything that is executed here."""
    for name in manifest.programs:
        for form in programs.forms(name):
            yield name if form == PORTABLE else f"{name}.{form}", name, form


def _check_form(manifest: Manifest, name: str, form: str, test: SelfTest, programs: Programs) -> FormChecks:
    entry = manifest.programs[name]
    if form != PORTABLE:
        test = _first_row(test, entry)
    own = _run(programs, name, form, test)
    checks = _compare(test, own, manifest.semantics)
    in_float = programs.in_float()
    if all(check.ok for check in checks) or in_float is None:
        return FormChecks(checks)
    checks = _compare(test, _run(in_float, name, form, test), manifest.semantics)
    return FormChecks(checks, _compare_task(entry, test, own))


def _run(programs: Programs, name: str, form: str, test: SelfTest) -> dict[str, np.ndarray]:
    try:
        found = programs.run(name, test.inputs, form)
    except TokoptError:
        raise
    except Exception as error:  # engines raise several unrelated classes
        reason = " ".join(str(error).split())
        raise TokoptError(f"the engine failed on the self-test of program {name!r}: {reason}") from error
    return {output: np.asarray(found[output]) for output in test.outputs}


def _compare(test: SelfTest, found: Mapping[str, np.ndarray], semantics: str) -> tuple[OutputCheck, ...]:
    return tuple(
        check_output(output, want, found[output], _limit(test, output, semantics))
        for output, want in test.outputs.items()
    )


def _limit(test: SelfTest, output: str, semantics: str) -> float:
    """The largest NMSE of an output."""
    if output in test.limits:
        return min(test.limits[output], LOOSEST)
    usual = SELFTEST_LIMITS[semantics]
    return LIMITS.get(str(test.outputs[output].dtype), 0.0) if usual is None else usual


def _compare_task(
    entry: ProgramEntry, test: SelfTest, found: Mapping[str, np.ndarray]
) -> tuple[TaskCheck, ...]:
    """The checks of every output that is a prediction or an array of floats for the caller or another program."""
    checks: list[TaskCheck] = []
    for tensor in entry.outputs:
        if tensor.role == "state" or tensor.name not in test.outputs:
            continue
        want, got = test.outputs[tensor.name], found[tensor.name]
        if not np.issubdtype(want.dtype, np.floating) or want.shape != got.shape:
            continue
        want, got = np.atleast_1d(want), np.atleast_1d(got)
        if tensor.role == "logits":
            checks.append(_task_check(test, tensor.name, KL, float(divergences(want, got).mean())))
            checks[-1] = replace(checks[-1], agreement=agreement(want, got))
            want, got = (x - x.mean(-1, keepdims=True) for x in (want, got))  # a common offset says nothing
        checks.append(_task_check(test, tensor.name, COSINE, _distance(want, got)))
    return tuple(checks)


def _task_check(test: SelfTest, output: str, measure: str, value: float) -> TaskCheck:
    loosest = TASK_LOOSEST[measure]
    limit = test.task_limits.get(measure, {}).get(output, loosest)
    return TaskCheck(output, measure, value, min(limit, loosest))


def _distance(expected: np.ndarray, actual: np.ndarray) -> float:
    """1 - cosine, the mean over all vectors of the last axis; vectors of zeros in both are alike."""
    alike = (expected == actual).all(-1)
    return 1.0 - float(np.where(alike, 1.0, cosines(expected, actual)).mean())


def _first_row(test: SelfTest, entry: ProgramEntry) -> SelfTest:
    """The test cut to one row of whatever has a batch, without outputs on an axis that the batch is a factor of."""
    rowless = {tensor.name for tensor in entry.outputs if any(map(_is_of_rows, tensor.axes))}
    outputs = {name: value for name, value in test.outputs.items() if name not in rowless}
    return replace(test, inputs=_cut(test.inputs, entry.inputs), outputs=_cut(outputs, entry.outputs))


def _is_of_rows(axis: str | int) -> bool:
    """Whether an axis is computed from the batch: which part of it is a row's, its name does not say."""
    return isinstance(axis, str) and axis != BATCH and re.search(rf"\b{BATCH}\b", axis) is not None


def _cut(arrays: Mapping[str, np.ndarray], tensors: Sequence[Tensor]) -> dict[str, np.ndarray]:
    cut = dict(arrays)
    for tensor in tensors:
        if BATCH in tensor.axes and tensor.name in cut:
            cut[tensor.name] = np.take(cut[tensor.name], [0], tensor.axes.index(BATCH))
    return cut


def compared(outputs: Iterable[TensorLike], states: Iterable[State]) -> tuple[str, ...]:
    """The names of the outputs of a program that a self-test compares, in their order.

    A buffer between two writes is not seen where both are made in place. Tables change no output, but when it comes:
    they hold what may follow, and some of that is nearly tied.
    """
    tables = {state.name for state in states if state.kind == "table"}
    return tuple(spec.name for spec in outputs if spec.role != "written" and spec.state not in tables)


def read_selftest(folder: Path, manifest: Manifest, program: str) -> SelfTest:
    """What is stored of a program; raises ArtifactError."""
    if manifest.selftest is None:
        raise ArtifactError(f"{folder} has no self-test; export the artifact again")
    path = file_path(folder, manifest.selftest)
    entry = manifest.programs[program]
    outputs = compared(entry.outputs, manifest.states)
    try:
        tensors = safetensors.numpy.load_file(path)
        return SelfTest(
            {tensor.name: tensors[f"{program}/inputs/{tensor.name}"] for tensor in entry.inputs},
            {name: tensors[f"{program}/outputs/{name}"] for name in outputs},
            _numbers(tensors, f"{program}/limits/"),
            {measure: _numbers(tensors, f"{program}/{measure}/") for measure in TASK_LOOSEST},
        )
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); copy or export the artifact again") from error


def _numbers(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, float]:
    """The stored numbers of a program by output."""
    return {
        key.removeprefix(prefix): float(array) for key, array in tensors.items() if key.startswith(prefix)
    }
