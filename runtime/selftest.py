"""The self-test of an artifact: stored inputs, and the outputs that the exported programs gave for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import safetensors
import safetensors.numpy

from tokopt.errors import ArtifactError, TokoptError
from tokopt.runtime.manifest import Manifest, file_path
from tokopt.runtime.numerics import SELFTEST_LIMITS, OutputCheck, check_output


def run_selftest(
    folder: Path, manifest: Manifest, program: str, session: onnxruntime.InferenceSession
) -> tuple[OutputCheck, ...]:
    """Run a program on its stored inputs and compare every output with the one stored."""
    inputs, outputs = read_selftest(folder, manifest, program)
    try:
        values = session.run(list(outputs), inputs)
    except Exception as error:  # ONNX Runtime raises several unrelated classes
        reason = " ".join(str(error).split())
        raise TokoptError(f"ONNX Runtime failed on the self-test of {folder}: {reason}") from error
    limit = SELFTEST_LIMITS[manifest.semantics]
    return tuple(
        check_output(name, want, np.asarray(got), limit)
        for (name, want), got in zip(outputs.items(), values, strict=True)
    )


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
