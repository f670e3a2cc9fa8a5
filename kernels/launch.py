"""What every kernel launch is made of, whatever executes it: CUDA, or the host shim of the tests.

``kernels/<op>/launch.py`` has one function ``launch(build, outputs, *arguments)`` that names the kernels of
``kernels/<op>/kernel.cu`` in order, with their grids and arguments. Scratch comes from torch's allocator, so launches
may be captured in a CUDA graph. It does not branch on sizes: TensorRT's plugins are derived from one run on symbolic
ones (:mod:`tokopt.kernels.plugins`).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from importlib import import_module
from importlib.resources import files
from typing import Any, Protocol

import torch
from torch import Tensor

BLOCK, WARPS, TILE = 256, 8, 64
"""Threads of a block, warps of a block, and rows that a block takes of all pairs, as in the sources."""

SCALARS = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
"""The dtypes that kernels are built for, by their names in ``shared.cuh``."""


class Run(Protocol):
    """Launches one kernel of an op."""

    def __call__(
        self,
        kernel: str,
        grid: tuple[int, int],
        inputs: tuple[Tensor, ...],
        scalars: tuple[int | float, ...],
        outputs: tuple[Tensor, ...],
    ) -> None:
        """``grid`` counts blocks, then rows of the batch. A kernel takes its arguments in this order."""
        ...


Build = Callable[[str], Run]
"""Compiles an op's kernels for a scalar of ``shared.cuh``."""


def launched(name: str, build: Build) -> Callable[..., Any]:
    """The op ``name`` executed by its kernels: a function of what the op takes that returns what it returns.

    Raises InputError for arguments outside the op's contract, before anything is launched.
    """
    reference = import_module(f"tokopt.kernels.{name}.reference")
    launch = import_module(f"tokopt.kernels.{name}.launch").launch

    def form(*given: Any) -> Any:
        arguments = [value.contiguous() if isinstance(value, Tensor) else value for value in given]
        outputs = reference.fake(*arguments)
        launch(build, outputs, *arguments)
        return outputs

    return form


def supports(arguments: tuple[Any, ...]) -> bool:
    """Whether the kernels are built for the floating-point dtypes of an op's arguments."""
    return all(
        value.dtype in SCALARS
        for value in arguments
        if isinstance(value, Tensor) and value.is_floating_point()
    )


def ceil(count: int, each: int) -> int:
    """Blocks of ``each`` that hold ``count``."""
    return (count + each - 1) // each


def source(name: str) -> str:
    """The CUDA source of an op, with what it includes in place of each ``#include``, once."""
    folder, included = files("tokopt.kernels"), set[str]()

    def expand(text: str) -> str:
        return re.sub(r'^#include "(.*)"$', lambda match: include(match[1]), text, flags=re.MULTILINE)

    def include(file: str) -> str:
        if file in included:
            return ""
        included.add(file)
        return expand(folder.joinpath(file).read_text())

    return expand(folder.joinpath(name, "kernel.cu").read_text())


_KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(([^)]*)\)')


def signatures(name: str) -> dict[str, tuple[int, int, int]]:
    """How many inputs, scalars and outputs the kernels of an op have, by kernel.

    They come in this order, which TensorRT's plugins need; what a kernel does not write is ``const``.
    """
    found = {}
    for kernel, parameters in _KERNEL.findall(source(name)):
        kinds = [
            "." if "*" not in p else "i" if p.lstrip().startswith("const ") else "o"
            for p in parameters.split(",")
        ]
        if not re.fullmatch(r"i*\.*o*", "".join(kinds)):
            raise ValueError(f"{name}: {kernel} has to take inputs, scalars and outputs in this order")
        found[kernel] = (kinds.count("i"), kinds.count("."), kinds.count("o"))
    return found


class Parameters:
    """Arguments in the layout that ``cuLaunchKernel`` reads: the ``address`` of an array of pointers to them."""

    def __init__(self, *arguments: Tensor | int | float) -> None:
        self._values = [_in_c(value) for value in arguments]
        self._pointers = (ctypes.c_void_p * len(self._values))(*map(ctypes.addressof, self._values))
        self.address = ctypes.addressof(self._pointers)


def _in_c(value: Tensor | int | float) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_float(value)
