"""Every CUDA kernel on a GPU against float64: ``python -m pytest tests/gpu``. Not collected without being asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.forms import CASES, Case, arrays, expected, world
from tests.kernels.test_cuda import FLOAT_ONLY, ROUNDED, assert_close
from tokopt.kernels import ops
from tokopt.kernels.catalogue import CUDA_OPS
from tokopt.kernels.launch import SCALARS

REPETITIONS = 20
cases = pytest.mark.parametrize("case", [case for case in CASES if case.op in CUDA_OPS], ids=str)


def on_gpu(case: Case, arguments: dict) -> tuple[np.ndarray, ...]:
    """The op on CUDA tensors, in memory that was full of NaN before."""
    moved = [value.cuda() if isinstance(value, Tensor) else value for value in arguments.values()]
    poison = torch.full((1 << 24,), torch.nan, device="cuda")
    del poison
    outputs = getattr(ops, case.op)(*moved)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return arrays(tuple(output.cpu() for output in outputs))


@cases
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_kernels_equal_naive_and_repeat(case: Case, data: st.DataObject) -> None:
    """Fresh inputs, all dtypes; a race would show as a difference between repetitions."""
    free = data.draw(st.sampled_from([2, 3, 63, 64, 65, 129, 197, 290]), "free")
    r = data.draw(st.integers(0, case.most(free)), "r")
    padding = data.draw(st.sampled_from([0, 0, 1, free // 2, free]), "padding")
    channels = data.draw(st.sampled_from([3, 8, 17, 33, 64]), "channels")
    dtype = torch.float32 if case.op in FLOAT_ONLY else data.draw(st.sampled_from(list(SCALARS)), "dtype")
    seed = data.draw(st.integers(0, 9999), "seed")
    arguments = world(case, 3, case.prefix + free, r, seed, padding, channels)
    assume(free - padding != 2 or ("margin" not in case.static and case.static.get("method") != "kcenter"))
    for name in ROUNDED & {*arguments}:
        if arguments[name].is_floating_point():
            arguments[name] = arguments[name].to(dtype)
    first = on_gpu(case, arguments)
    assert_close(first, expected(case, arguments), dtype)
    for _ in range(REPETITIONS):
        for again, once in zip(on_gpu(case, arguments), first, strict=True):
            np.testing.assert_array_equal(again, once)


@pytest.mark.parametrize("op", ["bipartite_match", "merge_tokens"])
def test_streams_and_graphs_are_respected(op: str) -> None:
    """Captured once, replayed on other inputs, on a stream of its own."""
    case = next(case for case in CASES if case.op == op)
    one, two = (world(case, 2, case.prefix + 64, 16, seed) for seed in (0, 1))
    held = [value.cuda() if isinstance(value, Tensor) else value for value in one.values()]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        getattr(ops, op)(*held)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = getattr(ops, op)(*held)
        for place, value in zip(held, two.values(), strict=True):
            if isinstance(place, Tensor):
                place.copy_(value)
        graph.replay()
    stream.synchronize()
    assert_close(arrays(tuple(o.cpu() for o in outputs)), expected(case, two), torch.float32)


def test_float64_takes_the_reference() -> None:
    metric, size = torch.randn(1, 9, 4, dtype=torch.float64).cuda(), torch.ones(1, 9).cuda()
    keep, drop, dest = ops.bipartite_match(metric, size, 2, 1)
    assert keep.shape == (1, 7) and drop.shape == dest.shape == (1, 2)
