"""What times were measured on: the processor, its instructions, and the engine."""

# ONNX Runtime is untyped.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import os
import platform
from pathlib import Path

import onnxruntime

INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "bf16")
"""What decides how fast quantized and half-precision products are; the last is Arm's."""


def describe_machine(threads: int | None) -> dict[str, object]:
    """Processor, instructions, cores, threads (None: all cores) and versions, as JSON values.

    Times that were measured where this is the same may stand for times here.
    """
    return {
        "cpu": cpu_model(),
        "instructions": instructions(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "onnxruntime": onnxruntime.__version__,
    }


def cpu_model() -> str:
    """The processor's name as the system reports it; virtual machines often shorten it."""
    return _reported("model name") or platform.processor() or platform.machine()


def instructions() -> list[str]:
    """Which of :data:`INSTRUCTIONS` the processor has."""
    known = (_reported("flags") or _reported("Features")).split()
    return [name for name in INSTRUCTIONS if name in known]


def _reported(field: str) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")
