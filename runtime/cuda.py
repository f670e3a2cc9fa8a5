"""CUDA through ``cuda.bindings``: which GPU there is."""

from __future__ import annotations

from typing import Any

from tokopt.errors import InputError, MissingDependencyError


def device_arch() -> str:
    """The compute capability of the current GPU, ``"sm_86"``.

    Raises MissingDependencyError without ``cuda.bindings``, InputError without a GPU.
    """
    cuda = import_cuda()
    kind = cuda.cudaDeviceAttr
    error, device = cuda.cudaGetDevice()
    if error != cuda.cudaError_t.cudaSuccess:
        raise InputError(f"there is no NVIDIA GPU that CUDA can use here ({error.name}); say which one is meant: arch='sm_86', --arch sm_86")
    parts = (kind.cudaDevAttrComputeCapabilityMajor, kind.cudaDevAttrComputeCapabilityMinor)
    return "sm_" + "".join(str(cuda.cudaDeviceGetAttribute(part, device)[1]) for part in parts)


def import_cuda() -> Any:
    """``cuda.bindings.runtime``; raises MissingDependencyError when it is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingDependencyError("CUDA's bindings are not installed; install tokopt[tensorrt-rtx]") from error
    return runtime
