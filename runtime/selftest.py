"""The self-test of an artifact: stored inputs, and the outputs that the exported programs gave for them."""

# safetensors leaves the types of paths open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from tokopt.errors import ArtifactError, InputError, TokoptError
from tokopt.runtime.engines.base import Programs
from tokopt.runtime.format.manifest import PORTABLE, Manifest, file_path
from tokopt.runtime.format.signature import BATCH, Tensor
from tokopt.runtime.numerics import SELFTEST_LIMITS, OutputCheck, check_output


def run_selftests(folder: Path, manifest: Manifest, programs: Programs) -> dict[str, tuple[OutputCheck, ...]]:
    """Run every form of every program on its stored inputs and compare every output with the one stored.

    The key is the program's name, for another form than the portable one with that form's name: ``step.onnxruntime``,
    which runs one row of the stored batch. Raises ArtifactError when there are no stored inputs, and TokoptError when
    the engine fails on them.
    """
    found: dict[str, tuple[OutputCheck, ...]] = {}
    for name in manifest.programs:
        for form in programs.forms(name):
            key, rows = (name, None) if form == PORTABLE else (f"{name}.{form}", 1)
            found[key] = _run_selftest(folder, manifest, programs, (name, form), rows)
    return found


def _run_selftest(
    folder: Path, manifest: Manifest, programs: Programs, which: tuple[str, str], rows: int | None
) -> tuple[OutputCheck, ...]:
    name, form = which
    inputs, outputs = read_selftest(folder, manifest, name)
    if rows is not None:
        entry = manifest.programs[name]
        inputs, outputs = _rows(inputs, entry.inputs, rows), _rows(outputs, entry.outputs, rows)
    try:
        values = programs.run(name, inputs, form)
    except InputError:
        raise
    except Exception as error:  # engines raise several unrelated classes
        reason = " ".join(str(error).split())
        raise TokoptError(f"the engine failed on the self-test of {folder}: {reason}") from error
    limit = SELFTEST_LIMITS[manifest.semantics]
    return tuple(
        check_output(output, want, np.asarray(values[output]), limit) for output, want in outputs.items()
    )


def _rows(arrays: Mapping[str, np.ndarray], tensors: Sequence[Tensor], count: int) -> dict[str, np.ndarray]:
    """The first rows of everything that has a batch."""
    cut = dict(arrays)
    for tensor in tensors:
        if BATCH in tensor.axes:
            rows = np.arange(min(count, cut[tensor.name].shape[tensor.axes.index(BATCH)]))
            cut[tensor.name] = np.take(cut[tensor.name], rows, tensor.axes.index(BATCH))
    return cut


def read_selftest(
    folder: Path, manifest: Manifest, program: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The stored inputs and expected outputs of a program; raises ArtifactError."""
    if manifest.selftest is None:
        raise ArtifactError(f"{folder} has no self-test; export the artifact again")
    path = file_path(folder, manifest.selftest)
    entry = manifest.programs[program]
    try:
        tensors = safetensors.numpy.load_file(path)
        return (
            {tensor.name: tensors[f"{program}/inputs/{tensor.name}"] for tensor in entry.inputs},
            {tensor.name: tensors[f"{program}/outputs/{tensor.name}"] for tensor in entry.outputs},
        )
    except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); copy or export the artifact again") from error
