"""Kernels of our own for the default engine: custom ops of ONNX Runtime, compiled when tokopt is installed.

Needs neither torch nor ONNX Runtime. A host registers the library itself:
``SessionOptions.register_custom_ops_library(str(library()))``.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from tokopt.errors import MissingDependencyError, TokoptError

DOMAIN = "tokopt.cpu"
"""The ONNX domain of the ops."""

VERSION = 2
"""The version of the ops: raised when inputs, attributes or meaning of one change."""

OPS = frozenset(
    {
        "CachedAttention",
        "DrawTokens",
        "ExpertLinear",
        "FloatExpertLinear",
        "Int8Linear",
        "LatestRepeat",
        "MoveEntries",
        "QuantizedLinear",
        "Uniforms",
    }
)
"""The ops of the domain."""

_PATH = Path(__file__).with_name("libtokopt_cpu.so")


def library() -> Path | None:
    """The shared library; None where it was not built or cannot be used, as :func:`problem` says."""
    return None if problem() else _PATH


@cache
def problem() -> str:
    """Why the library cannot be used, in one sentence; empty where it can."""
    if not _PATH.is_file():
        return "tokopt was installed without its CPU kernels, as no C++ compiler was found; install it again with one."
    try:
        version = _loaded().tokopt_cpu_version()
    except (OSError, AttributeError) as error:
        return f"the CPU kernels cannot be loaded ({error}); install tokopt again."
    if version != VERSION:
        return f"the CPU kernels are of version {version} and tokopt needs {VERSION}; install tokopt again."
    return ""


def isas() -> tuple[str, ...]:
    """The instruction sets of this processor that kernels are written for, fastest first; the last is plain C."""
    return tuple(_usable().tokopt_cpu_isas().decode().split(","))


def isa() -> str:
    """The instruction set that sessions use: what the environment variable TOKOPT_ISA names, else the fastest."""
    offered = isas()
    wanted = os.environ.get("TOKOPT_ISA") or offered[0]
    if wanted not in offered:
        raise TokoptError(
            f"TOKOPT_ISA={wanted} cannot be used on this processor; use one of {', '.join(offered)}, or unset it."
        )
    return wanted


def packed_bytes() -> int:
    """Bytes of packed weights that the sessions of this process hold together."""
    return _usable().tokopt_cpu_packed_bytes()


def _usable() -> ctypes.CDLL:
    if why := problem():
        raise MissingDependencyError(why)
    return _loaded()


@cache
def _loaded() -> ctypes.CDLL:
    found = ctypes.CDLL(str(_PATH))
    found.tokopt_cpu_isas.restype = ctypes.c_char_p
    found.tokopt_cpu_packed_bytes.restype = ctypes.c_size_t
    return found
