"""The self-test of an artifact: stored inputs, and the outputs that the exported programs gave for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from tokopt.errors import ArtifactError, TokoptError
from tokopt.runtime.buffers import run_in_place
from tokopt.runtime.format.manifest import Manifest, Tensor, file_path
from tokopt.runtime.numerics import SELFTEST_LIMITS, OutputCheck, check_output


def run_selftest(
    folder: Path,
    manifest: Manifest,
    program: str,
    session: Any,
    rows: int | None = None,
) -> tuple[OutputCheck, ...]:
    """Run a program on its stored inputs and compare every output with the one stored.

    ``rows`` takes so many rows of the stored batch, for a form that does not run all of it.
    """
    inputs, outputs = read_selftest(folder, manifest, program)
    if rows is not None:
        entry = manifest.programs[program]
        inputs, outputs = _rows(inputs, entry.inputs, rows), _rows(outputs, entry.outputs, rows)
    shared = {state.output: state.name for state in manifest.states if state.in_place}
    shared = {output: name for output, name in shared.items() if output in outputs and program == "step"}
    try:
        values = (
            run_in_place(session, list(outputs), inputs, shared)
            if shared
            else session.run(list(outputs), inputs)
        )
    except Exception as error:  # engines raise several unrelated classes
        reason = " ".join(str(error).split())
        raise TokoptError(f"the engine failed on the self-test of {folder}: {reason}") from error
    limit = SELFTEST_LIMITS[manifest.semantics]
    return tuple(
        check_output(name, want, np.asarray(got), limit)
        for (name, want), got in zip(outputs.items(), values, strict=True)
    )


def _rows(arrays: Mapping[str, np.ndarray], tensors: Sequence[Tensor], count: int) -> dict[str, np.ndarray]:
    """The first rows of everything that has a batch."""
    cut = dict(arrays)
    for tensor in tensors:
        if "batch" in tensor.axes:
            rows = np.arange(min(count, cut[tensor.name].shape[tensor.axes.index("batch")]))
            cut[tensor.name] = np.take(cut[tensor.name], rows, tensor.axes.index("batch"))
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
