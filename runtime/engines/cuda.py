"""CUDA through ``cuda.bindings``: which GPU there is, its memory, and work in the order of one stream."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from tokopt.errors import InputError, MissingDependencyError, TokoptError


@cache
def bindings() -> Any:
    """``cuda.bindings.runtime``; raises MissingDependencyError when it is not installed."""
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingDependencyError(
            "CUDA's bindings are not installed; install tokopt[tensorrt-rtx]"
        ) from error


def device_arch(remedy: str) -> str:
    """The compute capability of the current GPU, ``"sm_86"``.

    Raises MissingDependencyError without ``cuda.bindings``, InputError without a GPU, which ends with ``remedy``.
    """
    cuda = bindings()
    error, device = cuda.cudaGetDevice()
    if error != cuda.cudaError_t.cudaSuccess:
        raise InputError(f"there is no NVIDIA GPU that CUDA can use here ({error.name}); {remedy}")
    kind = cuda.cudaDeviceAttr
    parts = (kind.cudaDevAttrComputeCapabilityMajor, kind.cudaDevAttrComputeCapabilityMinor)
    return "sm_" + "".join(str(cuda.cudaDeviceGetAttribute(part, device)[1]) for part in parts)


def call(name: str, *arguments: Any) -> Any:
    """What the function ``name`` of CUDA's runtime returns; raises TokoptError when it fails."""
    cuda = bindings()
    error, *values = getattr(cuda, name)(*arguments)
    if error != cuda.cudaError_t.cudaSuccess:
        raise TokoptError(
            f"{name} failed on the GPU: {error.name}; free its memory, or use the default backend"
        )
    return values[0] if len(values) == 1 else values


def free_memory() -> int:
    """Bytes of GPU memory that can be allocated."""
    return call("cudaMemGetInfo")[0]


class DeviceArray:
    """A C-contiguous array in GPU memory, which is freed with it."""

    def __init__(self, shape: Sequence[int], dtype: np.dtype) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self.nbytes = math.prod(self.shape) * dtype.itemsize
        self.address = call("cudaMalloc", max(self.nbytes, 1))

    @classmethod
    def of(cls, array: np.ndarray) -> DeviceArray:
        """A copy of an array in host memory."""
        made = cls(array.shape, array.dtype)
        source = np.ascontiguousarray(array)
        call("cudaMemcpy", made.address, source.ctypes.data, made.nbytes, _kind("HostToDevice"))
        return made

    def numpy(self) -> np.ndarray:
        """A copy in host memory."""
        made = np.empty(self.shape, self.dtype)
        call("cudaMemcpy", made.ctypes.data, self.address, self.nbytes, _kind("DeviceToHost"))
        return made

    def __del__(self) -> None:
        if hasattr(self, "address"):
            bindings().cudaFree(self.address)


class Staged:
    """An array in GPU memory with page-locked host memory beside it, which copies of one stream go through."""

    def __init__(self, shape: Sequence[int], dtype: np.dtype) -> None:
        self.device = DeviceArray(shape, dtype)
        self._address = call("cudaMallocHost", max(self.device.nbytes, 1))
        memory = (ctypes.c_byte * self.device.nbytes).from_address(self._address)
        self.host: np.ndarray = np.frombuffer(memoryview(memory), dtype).reshape(self.device.shape)

    def upload(self, array: np.ndarray, stream: int) -> None:
        """Copy ``array`` to the GPU; the stream must have finished with the one before."""
        self.host[...] = array
        self._copy(self.device.address, self._address, "HostToDevice", stream)

    def download(self, stream: int) -> None:
        """Copy from the GPU to ``host``, which is valid when the stream has come that far."""
        self._copy(self._address, self.device.address, "DeviceToHost", stream)

    def _copy(self, target: int, source: int, kind: str, stream: int) -> None:
        call("cudaMemcpyAsync", target, source, self.device.nbytes, _kind(kind), stream)

    def __del__(self) -> None:
        if hasattr(self, "_address"):
            bindings().cudaFreeHost(self._address)


def _kind(name: str) -> Any:
    return getattr(bindings().cudaMemcpyKind, f"cudaMemcpy{name}")
