"""TensorRT: finding the builder and runtime that is installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tokopt.errors import MissingDependencyError

RTX = "tensorrt-rtx"

MODULES = {"tensorrt": "tensorrt", RTX: "tensorrt_rtx"}
"""Builder -> the module that it comes in, in order of preference; the extra of tokopt has the builder's name."""


def import_tensorrt() -> tuple[str, Any]:
    """Name and module of the TensorRT that is installed; raises MissingDependencyError without one."""
    for name, module in MODULES.items():
        try:
            return name, import_module(module)
        except (ImportError, OSError):  # OSError: the module is there and its libraries are not
            continue
    raise MissingDependencyError("TensorRT is not installed; install tokopt[tensorrt-rtx], or tokopt[tensorrt]")
