"""Random numbers in one op: the same bits in every form and on every instruction set, bad input, sanitizers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper
from onnxruntime import InferenceSession

from tests.kernels import naive
from tests.kernels.linears import FAILURES, LIBRARY, needs_library, session, unaligned
from tests.kernels.sanitizers import check_watched, examples, skip_when_watched
from tokopt.kernels import cpu

Inputs = dict[str, np.ndarray]


def inputs(rows: list[tuple[int, int, int]], count: int) -> Inputs:
    """A seed, a stream and a counter of every row."""
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    named = dict(zip(("seed", "stream", "counter"), map(np.ascontiguousarray, columns), strict=True))
    return {**named, "count": np.array(count)}


def onnx_model() -> ModelProto:
    """One node of the op."""
    names = ["seed", "stream", "counter", "count"]
    node = helper.make_node("Uniforms", names, ["uniform"], name="random", domain=cpu.DOMAIN)
    graph = helper.make_graph(
        [node],
        "uniforms",
        [helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in names],
        [helper.make_tensor_value_info("uniform", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(cpu.DOMAIN, cpu.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def reference_form(given: Inputs) -> np.ndarray:
    import torch

    from tokopt.kernels.uniforms.reference import uniforms

    seed, stream, counter = (torch.from_numpy(given[name]) for name in ("seed", "stream", "counter"))
    return uniforms(seed, stream, counter, int(given["count"])).numpy()


@cache
def opened(isa: str) -> InferenceSession:
    return session(onnx_model(), isa)


def library_form(isa: str) -> Callable[[Inputs], np.ndarray]:
    def run(given: Inputs) -> np.ndarray:
        words = {name: unaligned(array) for name, array in given.items()}
        return np.asarray(opened(isa).run(None, words)[0])

    return run


FORMS: dict[str, Callable[[Inputs], np.ndarray]] = {
    "reference": reference_form,
    **({f"library-{isa}": library_form(isa) for isa in cpu.isas()} if LIBRARY else {}),
}
"""The numbers [batch, count] of every row: the reference, and the library on each instruction set."""

forms = pytest.mark.parametrize("form", FORMS)

counters = st.one_of(
    st.integers(0, 2**40), st.integers(2**32 - 70, 2**32), st.integers(2**63 - 99, 2**63 - 1)
)
"""Words that wrap within a row among them: counters that differ by 2**32 give the same number."""

rows = st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), counters)


@forms
@examples(100)
@given(st.lists(rows, max_size=4), st.integers(0, 70))
@example([(2**63 - 1, 2**32 - 1, 2**32 - 1), (0, 0, 0)], 70)
@example([], 3)
def test_the_same_bits_as_the_definition(form: str, rows: list[tuple[int, int, int]], count: int) -> None:
    given = inputs(rows, count)
    got = FORMS[form](given)
    assert got.dtype == np.float32 and got.shape == (len(rows), count)
    np.testing.assert_array_equal(got, naive.uniforms(**{**given, "count": count}))


@forms
def test_a_known_answer(form: str) -> None:
    """Of those that Threefry-2x32's authors publish, the one whose block is zero; test_sampling.py has the others."""
    assert FORMS[form](inputs([(0, 0, 0)], 1)) == (0x6B200159 >> 8) / 2**24


@needs_library
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "vector"])
def test_count_is_one_number(shape: tuple[int, ...]) -> None:
    given = inputs([(7, 0, 3), (8, 1, 0)], 5)
    (got,) = session(onnx_model()).run(None, {**given, "count": given["count"].reshape(shape)})
    np.testing.assert_array_equal(got, naive.uniforms(**{**given, "count": 5}))


GOOD = inputs([(7, 0, 3), (8, 1, 0)], 5)

BAD: dict[str, tuple[Inputs, str]] = {
    "seed": ({"seed": np.zeros((2, 1), np.int64)}, "seed must be .batch., got .2, 1."),
    "no batch": ({"seed": np.array(3)}, "seed must be .batch., got .."),
    "stream": ({"stream": np.zeros(3, np.int64)}, "stream must be .2., got .3."),
    "counter": ({"counter": np.zeros((2, 1), np.int64)}, "counter must be .2., got .2, 1."),
    "axes": ({"counter": np.zeros((1,) * 6, np.int64)}, "counter must be .2., got 6 axes"),
    "negative": ({"count": np.array(-1)}, "count must not be negative, got -1"),
    "counts": ({"count": np.array([2, 3])}, "count must be one number, got .2."),
    "no count": ({"count": np.zeros(0, np.int64)}, "count must be one number, got .0."),
}


@needs_library
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    """In one sentence that names the op, before anything is computed."""
    wrong, words = BAD[name]
    with pytest.raises(FAILURES, match=words) as caught:
        session(onnx_model()).run(None, {**GOOD, **wrong})
    assert "tokopt.cpu::Uniforms 'random': " in str(caught.value)


@needs_library
@skip_when_watched
def test_sanitizers_find_nothing() -> None:
    check_watched(__file__)
