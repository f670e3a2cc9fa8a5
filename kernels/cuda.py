"""The CUDA implementation of the token ops: compiled by NVRTC when first used, cached, launched on torch's stream."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokopt.errors import MissingDependencyError, TokoptError
from tokopt.kernels.launch import BLOCK, Parameters, Run, launched, source, supports

OPTIONS = ("--std=c++17",)


def available() -> bool:
    """Whether there is a device, and what compiles for it."""
    return torch.cuda.is_available() and find_spec("cuda.bindings") is not None


def implementation(name: str) -> Callable[..., Any]:
    """The op ``name`` on CUDA tensors: its kernels, or for dtypes that they do not know (float64) the reference."""
    form = launched(name, partial(_build, name))
    reference = getattr(import_module(f"tokopt.kernels.{name}.reference"), name)

    def run(*arguments: Any) -> Any:
        if not supports(arguments):
            return reference(*arguments)
        device = next(value.device for value in arguments if isinstance(value, Tensor))
        with torch.cuda.device(device):
            return form(*arguments)

    return run


def _build(name: str, scalar: str) -> Run:
    device = torch.cuda.current_device()

    def run(
        kernel: str,
        grid: tuple[int, int],
        inputs: tuple[Tensor, ...],
        scalars: tuple[int | float, ...],
        outputs: tuple[Tensor, ...],
    ) -> None:
        if 0 in grid:
            return
        function = _function(name, scalar, kernel, device)
        parameters = Parameters(*inputs, *scalars, *outputs)
        stream = torch.cuda.current_stream().cuda_stream
        _driver("cuLaunchKernel", function, *grid, 1, BLOCK, 1, 1, 0, stream, parameters.address, 0)

    return run


@cache
def _function(name: str, scalar: str, kernel: str, device: int) -> Any:
    return _driver("cuModuleGetFunction", _module(name, scalar, device), kernel.encode())


@cache
def _module(name: str, scalar: str, device: int) -> Any:
    major, minor = torch.cuda.get_device_capability(device)
    return _driver("cuModuleLoadData", compiled(name, scalar, f"sm_{major}{minor}"))


def compiled(name: str, scalar: str, arch: str) -> bytes:
    """The machine code of an op's kernels, of the cache or by NVRTC; ``compute_XX`` as ``arch`` gives PTX.

    The cache is ``$XDG_CACHE_HOME/tokopt/kernels``; source, scalar, architecture, options and NVRTC's version make the
    name. Raises TokoptError with NVRTC's log when the source does not compile.
    """
    text = source(name)
    version = _checked("nvrtc", "nvrtcVersion")
    key = hashlib.sha256(repr((text, scalar, arch, OPTIONS, version)).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokopt" / "kernels"
    path = folder / f"{name}-{scalar.replace(' ', '_')}-{arch}-{key[:16]}"
    with suppress(OSError):
        return path.read_bytes()
    code, _ = compile_source(name, scalar, arch)
    with suppress(OSError):  # a disk that is full or read-only: the next process compiles it again
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=path.name) as file:
            file.write(code)
            file.flush()
            os.link(file.name, path)
    return code


def compile_source(name: str, scalar: str, arch: str, *options: str) -> tuple[bytes, str]:
    """Machine code (PTX for ``compute_XX``) and NVRTC's log; needs no device. Raises TokoptError."""
    texts = (source(name).encode(), f"{name}.cu".encode(), 0, [], [])
    program = _checked("nvrtc", "nvrtcCreateProgram", *texts)
    chosen = [f"--gpu-architecture={arch}", f"-DSCALAR={scalar}", *OPTIONS, *options]
    nvrtc = _bindings("nvrtc")
    (outcome,) = nvrtc.nvrtcCompileProgram(program, len(chosen), [option.encode() for option in chosen])
    log = b" " * _checked("nvrtc", "nvrtcGetProgramLogSize", program)
    _checked("nvrtc", "nvrtcGetProgramLog", program, log)
    text = log.decode(errors="replace").rstrip("\0 \n")
    if outcome != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise TokoptError(f"the kernels of tokopt::{name} do not compile for {arch} with {scalar}: {text}")
    kind = "PTX" if arch.startswith("compute") else "CUBIN"
    code = b" " * _checked("nvrtc", f"nvrtcGet{kind}Size", program)
    _checked("nvrtc", f"nvrtcGet{kind}", program, code)
    return code, text


def _driver(function: str, *arguments: Any) -> Any:
    return _checked("driver", function, *arguments)


def _checked(library: str, function: str, *arguments: Any) -> Any:
    """The result of a call to the driver or to NVRTC; raises TokoptError when it fails."""
    error, *results = getattr(_bindings(library), function)(*arguments)
    if error:
        raise TokoptError(f"{function} failed with {error.name}; see the CUDA documentation of that code")
    return results[0] if len(results) == 1 else tuple(results) or None


@cache
def _bindings(library: str) -> Any:
    try:
        return import_module(f"cuda.bindings.{library}")
    except ImportError as error:
        raise MissingDependencyError(
            "compiling CUDA kernels needs cuda.bindings; install the extra: tokopt[cuda]"
        ) from error
