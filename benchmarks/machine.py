"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "bf16")
"""What decides how fast quantized and half-precision products are; the last is Arm's."""

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


def cpu_model() -> str:
    """The processor's name as the system reports it; virtual machines often shorten it."""
    return _reported("model name") or platform.processor() or platform.machine()


def instructions() -> list[str]:
    """Which of :data:`INSTRUCTIONS` the processor has."""
    known = (_reported("flags") or _reported("Features")).split()
    return [name for name in INSTRUCTIONS if name in known]


def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16; elsewhere engines emulate it, or compute in float32."""
    return any(name.endswith("bf16") for name in instructions())


def _reported(field: str) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
