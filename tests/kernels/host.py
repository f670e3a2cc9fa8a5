"""Launches the CUDA kernels on the CPU: their own source, compiled by g++ behind ``host_shim.h``."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.shared import once
from tokopt.kernels.launch import BLOCK, Parameters, Run, launched, signatures, source
from tokopt.kernels.plugins import DTYPES, Expression, Launch, evaluate

SHIM = Path(__file__).with_name("host_shim.h")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fno-gnu-unique", "-U_FORTIFY_SOURCE")
"""Fortified, jumps from one fiber's stack to another's are refused."""

ENTRY = 'extern "C" void host_{0}(void **a, int x, int y, int t, int back) {{ host::run({0}, a, x, y, t, back); }}\n'


def host_form(name: str, *, reverse: bool = False) -> Callable[..., Any]:
    """The op ``name`` as its kernels compute it, with the threads of a block in order or in reverse."""
    return launched(name, partial(_build, name, reverse))


def _build(name: str, reverse: bool, scalar: str) -> Run:
    def run(
        kernel: str,
        grid: tuple[int, int],
        inputs: tuple[Tensor, ...],
        scalars: tuple[int | float, ...],
        outputs: tuple[Tensor, ...],
    ) -> None:
        function = getattr(library(name, scalar), f"host_{kernel}")
        parameters = Parameters(*inputs, *scalars, *outputs)
        function(ctypes.c_void_p(parameters.address), *grid, BLOCK, reverse)

    return run


def _shim() -> Path:
    """The shim, and beside it what the compiler made of it, which is half of what compiling a kernel takes."""
    return once("host_shim", _compile_shim) / SHIM.name


def _compile_shim(folder: Path) -> None:
    folder.mkdir()
    header = shutil.copy(SHIM, folder)
    subprocess.run(["g++", *FLAGS, "-x", "c++-header", header, "-o", f"{header}.gch"], check=True)


@cache
def library(name: str, scalar: str) -> ctypes.CDLL:
    """An op's kernels for one scalar as a library of functions ``host_<kernel>``."""
    code = source(name) + "".join(map(ENTRY.format, signatures(name)))
    digest = hashlib.sha256(code.encode()).hexdigest()[:12]
    return ctypes.CDLL(str(once(f"{name}_{scalar}_{digest}.so", partial(_compile, code, scalar))))


def _compile(code: str, scalar: str, built: Path) -> None:
    file = built.with_suffix(".cpp")
    file.write_text(code)
    given = ("-shared", f"-DSCALAR={scalar}", "-include", _shim(), file)
    subprocess.run(["g++", *FLAGS, *given, "-o", built], check=True)


def run_plugin(op: str, launch: Launch, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the plugin of one kernel puts out: its launch, computed from the inputs' sizes, on the CPU."""

    def value(expression: Expression) -> int:
        return evaluate(expression, lambda i, axis: inputs[i].shape[axis], max)

    outputs = [
        torch.empty([value(size) for size in output.shape], dtype=_DTYPES[output.dtype])
        for output in launch.outputs
    ]
    columns, rows = map(value, launch.grid)
    scalars = [
        value(scalar) for scalar in launch.scalars
    ]  # floats as the integers of their bits, as in TensorRT
    held = [tensor.contiguous() for tensor in inputs]
    parameters = Parameters(*held, *scalars, *outputs)
    function = getattr(library(op, launch.scalar), f"host_{launch.kernel}")
    function(ctypes.c_void_p(parameters.address), columns, rows, BLOCK, False)
    return outputs


_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
