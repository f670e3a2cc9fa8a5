"""The CUDA source: executed on the CPU through the host shim, and compiled for real architectures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.kernels import host
from tests.kernels.forms import CASES, KERNELS, Case, expected, world
from tokopt.errors import InputError
from tokopt.kernels import launch
from tokopt.kernels.catalogue import CUDA_OPS
from tokopt.kernels.cuda import compile_source, compiled
from tokopt.kernels.launch import SCALARS, launched, signatures

ROUNDED = {"metric", "x", "score", "query", "key"}
"""Arguments that may be of half precision."""

FLOAT_ONLY = {"quantize_keys", "dequantize_keys"}
"""Ops whose tensors are float32 by contract."""

cases = pytest.mark.parametrize("case", [case for case in CASES if case.op in CUDA_OPS], ids=str)


def assert_close(got: tuple[np.ndarray, ...], want: tuple[np.ndarray, ...], dtype: torch.dtype) -> None:
    """Integers are equal; floats are off by one rounding to ``dtype``, and float32's in the sums before."""
    assert [g.shape for g in got] == [w.shape for w in want]
    for g, w in zip(got, want, strict=True):
        if g.dtype.kind == "f":
            np.testing.assert_allclose(g, w, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=2e-6)
        else:
            np.testing.assert_array_equal(g, w)


@cases
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_kernels_equal_naive(case: Case, data: st.DataObject) -> None:
    """Sizes of one, odd sizes, sizes beyond a tile and a block, all dtypes; the order of threads changes no bit."""
    slow = case.op == "farthest_point"  # as many steps as choices, and ten thousand fibers in each
    batch = data.draw(st.integers(1, 2), "batch")
    free = data.draw(st.sampled_from([2, 3, 33, 70] if slow else [2, 3, 63, 64, 65, 129, 290]), "free")
    most = case.most(free)
    r = data.draw(st.integers(max(0, most - 8) if slow else 0, most), "r")
    padding = data.draw(st.sampled_from([0, 0, 1, free // 2, free]), "padding")
    channels = data.draw(st.sampled_from([3, 8, 16, 17, 33]), "channels")
    dtype = torch.float32 if case.op in FLOAT_ONLY else data.draw(st.sampled_from(list(SCALARS)), "dtype")
    seed = data.draw(st.integers(0, 99), "seed")
    arguments = world(case, batch, case.prefix + free, r, seed, padding, channels)
    assume(free - padding != 2 or ("margin" not in case.static and case.static.get("method") != "kcenter"))
    for name in ROUNDED & {*arguments}:
        if arguments[name].is_floating_point():
            arguments[name] = arguments[name].to(dtype)
    in_order, in_reverse = (form(case, arguments) for form in KERNELS.values())
    for first, second in zip(in_order, in_reverse, strict=True):
        np.testing.assert_array_equal(first, second)
    assert_close(in_order, expected(case, arguments), dtype)


def test_half_precision_rounds_as_torch_does() -> None:
    """A merge of nothing stores what it loaded: all finite values of 16 bits pass through float32 unchanged."""
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = bits[bits.isfinite()][None, :, None].contiguous()
        size, keep = torch.ones(x.shape[:2]), torch.arange(x.shape[1])[None]
        none = torch.empty(1, 0, dtype=torch.int64)
        for form in KERNELS.values():
            merged, _ = form(
                Case("merge_tokens"), {"x": x, "size": size, "keep": keep, "drop": none, "dest": none}
            )
            np.testing.assert_array_equal(merged, x.float().numpy() if dtype == torch.bfloat16 else x.numpy())


def test_bad_arguments_are_refused_before_a_launch() -> None:
    def build(scalar: str):
        raise AssertionError("launched")

    with pytest.raises(InputError, match="r=9 is more than"):
        launched("top_tokens", build)(torch.zeros(1, 8), 9, 0)


# --- what the shim finds -------------------------------------------------------------------------------------

FILLED = "__shared__ float s[256]; s[threadIdx.x] = threadIdx.x; __syncthreads();"
TURNED = "s[threadIdx.x] = s[255 - threadIdx.x]; y[threadIdx.x] = s[threadIdx.x];"

BROKEN = {
    "a missing barrier": (FILLED + TURNED, "differ"),
    "shared memory that nobody wrote": ("__shared__ float s[256]; y[threadIdx.x] = s[threadIdx.x];", "nan"),
    "a barrier that some skip": ("if (threadIdx.x < 200) __syncthreads();", "returned at __syncthreads"),
    "lanes that left": (
        "if (threadIdx.x % 2) y[0] = __shfl_xor_sync(~0u, 1.0f, 1);",
        "returned at a warp operation",
    ),
}

SCRIPT = """
import ctypes, sys
found = []
for reverse in (False, True):
    y = (ctypes.c_float * 256)()
    given = ctypes.c_void_p(ctypes.addressof(y))
    ctypes.CDLL(sys.argv[1]).host_bad(ctypes.byref(ctypes.pointer(given)), 1, 1, 256, reverse)
    found.append(list(y))
print("nan" if found[0][0] != found[0][0] else "equal" if found[0] == found[1] else "differ")
"""
"""Runs a library's kernel in a process of its own, which the shim ends, and which takes no torch."""


@pytest.mark.parametrize("name", BROKEN)
def test_the_shim_finds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, symptom = BROKEN[name]
    code = f'extern "C" __global__ void bad(float *y) {{{body}}}'
    for module in (host, launch):
        monkeypatch.setattr(module, "source", lambda _: code)
    built = host.library.__wrapped__("bad", "float")
    command = [sys.executable, "-c", SCRIPT, built._name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert symptom in done.stdout + done.stderr, done.stderr[-500:]


# --- what NVRTC makes of it ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "scalars"), [("sm_80", ("float", "Half")), ("sm_90", ("BFloat16",))])
@pytest.mark.parametrize("name", CUDA_OPS)
def test_kernels_compile_without_spills(name: str, arch: str, scalars: tuple[str, ...]) -> None:
    """Every op for both architectures, and each scalar for one of them; half types differ in conversions alone."""
    for scalar in scalars:
        code, log = compile_source(name, scalar, arch, "--ptxas-options=-v")
        assert code[:4] == b"\x7fELF"
        assert all(f"'{kernel}'" in log for kernel in signatures(name))
        assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}


def test_machine_code_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = compiled("top_tokens", "float", "sm_80")
    (file,) = (tmp_path / "tokopt" / "kernels").iterdir()
    file.write_bytes(b"kept")
    assert compiled("top_tokens", "float", "sm_80") == b"kept" != first
    assert compiled("top_tokens", "Half", "sm_80") != b"kept"


def test_ptx_is_for_plugins() -> None:
    code, _ = compile_source("merge_tokens", "Half", "compute_80")
    assert b".target sm_80" in code and b".entry merge(" in code
