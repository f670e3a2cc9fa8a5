"""The search for a repeat in one op: what the definition finds, in every form; bad input, sanitizers."""

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

Found = tuple[np.ndarray, np.ndarray]


def onnx_model() -> ModelProto:
    """One node of the op."""
    node = helper.make_node(
        "LatestRepeat", ["text", "end"], ["place", "length"], name="search", domain=cpu.DOMAIN
    )
    graph = helper.make_graph(
        [node],
        "latest_repeat",
        [
            helper.make_tensor_value_info("text", TensorProto.INT32, None),
            helper.make_tensor_value_info("end", TensorProto.INT64, None),
        ],
        [helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in ("place", "length")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(cpu.DOMAIN, cpu.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def reference_form(text: np.ndarray, end: np.ndarray) -> Found:
    import torch

    from tokopt.kernels.latest_repeat.reference import latest_repeat

    place, length = latest_repeat(torch.from_numpy(text), torch.from_numpy(end))
    return place.numpy(), length.numpy()


@cache
def opened() -> InferenceSession:
    return session(onnx_model())


def library_form(text: np.ndarray, end: np.ndarray) -> Found:
    place, length = opened().run(None, {"text": unaligned(text), "end": unaligned(end)})
    return np.asarray(place), np.asarray(length)


FORMS: dict[str, Callable[[np.ndarray, np.ndarray], Found]] = {
    "reference": reference_form,
    **({"library": library_form} if LIBRARY else {}),
}

texts = st.integers(1, 30).flatmap(
    lambda size: st.lists(
        st.tuples(st.lists(st.integers(-1, 2), min_size=size, max_size=size), st.integers(-2, size - 1)),
        min_size=1,
        max_size=3,
    )
)
"""Rows of few kinds of entries, and where each ends, perhaps before it begins."""


@pytest.mark.parametrize("form", FORMS)
@examples(150)
@given(texts)
@example([([5], 0)])
@example([([1, 1, 1, 1, 1], 4)])
@example([([1, 2, 3, 9, 2, 3, 1, 2, 3], 8)])
def test_the_newest_of_the_longest_is_found(form: str, texts: list[tuple[list[int], int]]) -> None:
    """The last text agrees in two entries at 5 and in three at 2."""
    text = np.array([row for row, _ in texts], np.int32)
    end = np.array([last for _, last in texts])
    for got, want in zip(FORMS[form](text, end), naive.latest_repeat(text, end), strict=True):
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, want)


@needs_library
def test_no_rows_give_none() -> None:
    place, length = library_form(np.zeros((0, 4), np.int32), np.zeros(0, np.int64))
    assert place.shape == length.shape == (0,)


GOOD = {"text": np.zeros((2, 5), np.int32), "end": np.array([3, 4])}

BAD = {
    "text": ({"text": np.zeros(5, np.int32)}, "text must be .batch, size., got .5."),
    "end": ({"end": np.zeros(3, np.int64)}, "end must be .2., got .3."),
    "axes": ({"end": np.zeros((2, 1), np.int64)}, "end must be .2., got .2, 1."),
    "beyond": ({"end": np.array([3, 5])}, "row 1 ends at 5, and its text has 5 entries"),
}


@needs_library
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    """In one sentence that names the op, before anything is read."""
    wrong, words = BAD[name]
    with pytest.raises(FAILURES, match=words) as caught:
        session(onnx_model()).run(None, {**GOOD, **wrong})
    assert "tokopt.cpu::LatestRepeat 'search': " in str(caught.value)


@needs_library
@skip_when_watched
def test_sanitizers_find_nothing() -> None:
    check_watched(__file__)
