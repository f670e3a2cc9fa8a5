"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import psutil

from tokopt.runtime.machine import cpu_model, instructions

PACKAGES = ("tokopt", "torch", "transformers", "onnx", "onnxruntime", "numpy")


def describe(threads: int) -> dict[str, object]:
    """CPU model and instructions, cores, memory, system and package versions, as JSON values."""
    return {
        "cpu": cpu_model(),
        "instructions": instructions(),
        "cores": os.cpu_count(),
        "threads_used": threads,
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
    }


def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16; elsewhere engines emulate it, or compute in float32."""
    return any(name.endswith("bf16") for name in instructions())


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
