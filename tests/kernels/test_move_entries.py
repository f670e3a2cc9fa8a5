"""Moves of a cache's entries: every form of every dtype, in place and not, bad input, sanitizers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from tests.kernels import naive
from tests.kernels.linears import FAILURES, LIBRARY, needs_library, session
from tests.kernels.sanitizers import check_watched, examples, skip_when_watched
from tokopt.kernels import cpu

DTYPES: dict[int, np.dtype] = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    TensorProto.INT8: np.dtype(np.int8),
    TensorProto.UINT8: np.dtype(np.uint8),
    TensorProto.INT64: np.dtype(np.int64),
}
"""What caches consist of."""


@dataclass(frozen=True)
class Move:
    """The inputs of one call by name, and the type of the cache; they may be wrong on purpose."""

    inputs: Mapping[str, np.ndarray]
    kind: int = TensorProto.FLOAT

    def but(self, **inputs: np.ndarray) -> Move:
        """With other inputs."""
        return replace(self, inputs={**self.inputs, **inputs})


def move(
    shape: tuple[int, ...], path: np.ndarray, length: list[int], kind: int = TensorProto.FLOAT, seed: int = 0
) -> Move:
    """A move in a random cache."""
    cache = np.random.default_rng(seed).integers(0, 99, shape).astype(DTYPES[kind])
    return Move({"cache": cache, "path": path.astype(np.int64), "length": np.array(length, np.int64)}, kind)


def onnx_model(given: Move) -> ModelProto:
    """One node of the op."""
    kinds = {"cache": given.kind, "path": TensorProto.INT64, "length": TensorProto.INT64}
    node = helper.make_node("MoveEntries", [*kinds], ["moved"], name="move", domain=cpu.DOMAIN)
    axes = {name: [f"{name}{axis}" for axis in range(given.inputs[name].ndim)] for name in kinds}
    graph = helper.make_graph(
        [node],
        "move",
        [helper.make_tensor_value_info(name, kind, axes[name]) for name, kind in kinds.items()],
        [helper.make_tensor_value_info("moved", given.kind, None)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(cpu.DOMAIN, cpu.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def bound(given: Move, *, in_place: bool) -> np.ndarray:
    """What the library makes of buffers of its own; a cache that is not moved in place is checked to stay as it is."""
    made = session(onnx_model(given))
    binding = made.io_binding()
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(given.inputs[name].copy(), kind)
        for name, kind in {
            "cache": given.kind,
            "path": TensorProto.INT64,
            "length": TensorProto.INT64,
        }.items()
    }
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    target = values["cache"]
    if not in_place:
        blank = np.zeros_like(given.inputs["cache"])
        target = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(blank, given.kind)
    binding.bind_ortvalue_output("moved", target)
    made.run_with_iobinding(binding)
    if not in_place:
        assert bits(values["cache"]).tobytes() == given.inputs["cache"].tobytes()
    return bits(target).view(given.inputs["cache"].dtype).reshape(given.inputs["cache"].shape)


def bits(value: onnxruntime.OrtValue) -> np.ndarray:
    """The bytes of a value; numpy has no bfloat16 of its own."""
    return np.frombuffer(ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes()), np.uint8)


def reference_form(given: Move) -> np.ndarray:
    import torch

    from tokopt.kernels.move_entries.reference import move_entries

    cache, path, length = (given.inputs[name] for name in ("cache", "path", "length"))
    half = given.kind == TensorProto.BFLOAT16
    held = torch.from_numpy(cache.view(np.int16).copy() if half else cache.copy())
    held = held.view(torch.bfloat16) if half else held
    moved = move_entries(held, torch.from_numpy(path), torch.from_numpy(length))
    return (moved.view(torch.int16) if half else moved).numpy().view(cache.dtype)


FORMS: dict[str, Callable[[Move], np.ndarray]] = {
    "reference": reference_form,
    **(
        {
            "library": lambda given: bound(given, in_place=False),
            "library in place": lambda given: bound(given, in_place=True),
        }
        if LIBRARY
        else {}
    ),
}

forms = pytest.mark.parametrize("form", FORMS)


def assert_moved(given: Move, got: np.ndarray) -> None:
    want = naive.move_entries(*(given.inputs[name] for name in ("cache", "path", "length")))
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


@forms
@examples(60)
@given(st.data())
def test_every_entry_is_where_it_belongs(form: str, data: st.DataObject) -> None:
    """Of any sizes and dtype, along paths in any order: an entry may be wanted twice, and lie where another goes."""
    random = np.random.default_rng(data.draw(st.integers(0, 999), "seed"))
    batch, heads = data.draw(st.integers(1, 3), "batch"), data.draw(st.integers(1, 3), "heads")
    slots, channels = data.draw(st.integers(1, 20), "slots"), data.draw(st.integers(1, 9), "channels")
    nodes = data.draw(st.integers(0, slots), "nodes")
    length = [int(random.integers(0, slots - nodes + 1)) for _ in range(batch)]
    path = np.stack([random.integers(0, slots - first, nodes) if nodes else np.zeros(0) for first in length])
    kind = data.draw(st.sampled_from([*DTYPES]), "kind")
    moved = move((batch, heads, slots, channels), path, length, kind)
    assert_moved(moved, FORMS[form](moved))


@forms
@pytest.mark.parametrize("shape", [(0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 5, 0)], ids=str)
def test_a_cache_of_nothing_stays_nothing(form: str, shape: tuple[int, ...]) -> None:
    given = move(shape, np.zeros((shape[0], 2)), [1] * shape[0])
    assert FORMS[form](given).shape == shape


GOOD = move((2, 3, 8, 4), np.array([[0, 2, 1], [0, 1, 3]]), [4, 5])

BAD: dict[str, tuple[Move, str]] = {
    "cache": (
        GOOD.but(cache=np.zeros((2, 8, 4), np.float32)),
        r"cache must be \[batch, heads, slots, channels\], got \[2, 8, 4\]",
    ),
    "path": (GOOD.but(path=np.zeros(2, np.int64)), r"path must be \[2, nodes\], got \[2\]"),
    "rows": (GOOD.but(path=np.zeros((3, 3), np.int64)), r"path must be \[2, nodes\], got \[3, 3\]"),
    "length": (GOOD.but(length=np.zeros(1, np.int64)), r"length must be \[2\], got \[1\]"),
    "negative": (
        GOOD.but(length=np.array([4, -1])),
        "row 1 has length -1, and 3 nodes do not fit into 8 slots",
    ),
    "full": (GOOD.but(length=np.array([6, 5])), "row 0 has length 6, and 3 nodes do not fit into 8 slots"),
    "huge": (GOOD.but(length=np.array([2**63 - 1, 5])), "row 0 has length 9223372036854775807, and 3"),
    "behind": (
        GOOD.but(path=np.array([[0, 1, 2], [0, 1, 4]]), length=np.array([4, 4])),
        "path of row 1 has node 4, which is in none of the 8 slots from length 4 on",
    ),
    "before": (GOOD.but(path=np.array([[0, -1, 2], [0, 1, 2]])), "path of row 0 has node -1"),
    "far": (
        GOOD.but(path=np.array([[0, 1, 2], [0, 1, 2**63 - 1]])),
        "path of row 1 has node 9223372036854775807",
    ),
}


@needs_library
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    """In one sentence that names the op, before anything is moved."""
    given, words = BAD[name]
    with pytest.raises(FAILURES, match=words) as caught:
        session(onnx_model(given)).run(None, dict(given.inputs))
    assert "tokopt.cpu::MoveEntries 'move': " in str(caught.value)


@needs_library
@skip_when_watched
def test_sanitizers_find_nothing() -> None:
    check_watched(__file__)
