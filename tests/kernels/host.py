"""Launches the CUDA kernels on the CPU: their own source, compiled by g++ behind ``host_shim.h``."""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tokopt.kernels.launch import BLOCK, Parameters, Run, launched, source

SHIM = Path(__file__).with_name("host_shim.h")
ENTRY = 'extern "C" void host_{0}(void **a, int x, int y, int t, int back) {{ host::run({0}, a, x, y, t, back); }}\n'
KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(')


def host_form(name: str, *, reverse: bool = False) -> Callable[..., Any]:
    """The op ``name`` as its kernels compute it, with the threads of a block in order or in reverse."""
    return launched(name, partial(_build, name, reverse))


def _build(name: str, reverse: bool, scalar: str) -> Run:
    def run(kernel: str, grid: tuple[int, int], *arguments: Tensor | int | float | None) -> None:
        function = getattr(library(name, scalar), f"host_{kernel}")
        parameters = Parameters(arguments)
        function(ctypes.c_void_p(parameters.address), *grid, BLOCK, reverse)

    return run


def kernels(name: str) -> list[str]:
    """The names of an op's kernels."""
    return KERNEL.findall(source(name))


@cache
def library(name: str, scalar: str) -> ctypes.CDLL:
    """An op's kernels for one scalar as a library of functions ``host_<kernel>``."""
    folder = Path(tempfile.mkdtemp(prefix="tokopt-kernels-"))
    code = folder / f"{name}.cpp"
    code.write_text(source(name) + "".join(map(ENTRY.format, kernels(name))))
    built = folder / f"{name}.so"
    flags = ("-std=c++17", "-O1", "-shared", "-fPIC", "-fno-gnu-unique", f"-DSCALAR={scalar}")
    subprocess.run(["g++", *flags, "-include", str(SHIM), str(code), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))
