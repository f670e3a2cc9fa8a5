"""What this machine sustains: copies, and ONNX Runtime's products with weights of every kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from tokopt.runtime.engines.onnxruntime import ACTIVATIONS

Kind = Literal["float", "4 bits", "8 bits", "bytes"]
"""Weights in float32; in blocks of 4 or 8 bits; and bytes that are multiplied by activations in 8 bits."""

KINDS: tuple[Kind, ...] = ("float", "4 bits", "8 bits", "bytes")

ROWS = (1, 4, 16, 128)
"""Rows of the products that are measured."""

INPUTS, OUTPUTS, GROUP = 768, 1024, 32

TURNS = 12


@dataclass(frozen=True)
class Machine:
    """Bytes that are copied per second, and the seconds of a product per number of its weight, for each of ROWS.

    Products are measured on weights that fit into the caches; what it takes to read larger ones is said by ``bytes``.
    """

    bytes: float
    products: Mapping[Kind, tuple[float, ...]]

    def product(self, kind: Kind, rows: float, weights: float) -> float:
        """The seconds of a product of ``rows`` rows with a weight of so many numbers, once that is there."""
        times = self.products[kind]
        each = times[-1] * rows / ROWS[-1] if rows > ROWS[-1] else float(np.interp(rows, ROWS, times))
        return each * weights


def measure_machine() -> Machine:
    """Time products of transformer size and a large copy, in turns, so that a busy machine slows all alike.

    Takes about a second.
    """
    large = np.ones(16 * 2**20, np.float32)
    target = np.empty_like(large)
    works: list[Callable[[], object]] = [lambda: np.copyto(target, large)]
    for kind in KINDS:
        works += _products(kind)
    copy, *products = _shortest(works)
    each = [seconds / (INPUTS * OUTPUTS) for seconds in products]
    count = len(ROWS)
    found: dict[Kind, tuple[float, ...]] = {
        kind: _rising(each[i * count : (i + 1) * count]) for i, kind in enumerate(KINDS)
    }
    return Machine(2 * large.nbytes / copy, found)


def _rising(times: Sequence[float]) -> tuple[float, ...]:
    """Each no longer than the next: what took longer with fewer rows was disturbed, which makes nothing shorter."""
    return tuple(np.minimum.accumulate(times[::-1])[::-1].tolist())


def _shortest(works: Sequence[Callable[[], object]]) -> list[float]:
    """The seconds of each, the shortest of several turns."""
    times = [float("inf")] * len(works)
    for _ in range(TURNS):
        for i, work in enumerate(works):
            start = time.perf_counter()
            work()
            times[i] = min(times[i], time.perf_counter() - start)
    return times


def _products(kind: Kind) -> list[Callable[[], object]]:
    """A product for each of :data:`ROWS`."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry(*ACTIVATIONS)
    session = onnxruntime.InferenceSession(_model(kind), settings, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    given = [generator.standard_normal((rows, INPUTS)).astype(np.float32) for rows in ROWS]
    return [partial(session.run, None, {"x": x}) for x in given]


def _model(kind: Kind) -> bytes:
    """``x @ weight`` as the lowering writes it."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 16 if kind == "4 bits" else 256, (INPUTS, OUTPUTS))
    nodes = [helper.make_node("MatMul", ["given", "weight"], ["y"])]
    if kind == "float":
        held = {"weight": codes.astype(np.float32)}
    else:
        blocks = kind != "bytes"
        scales = np.full((INPUTS // GROUP, OUTPUTS) if blocks else (OUTPUTS,), 0.01, np.float32)
        dtype = ml_dtypes.uint4 if kind == "4 bits" else np.uint8
        zeros = np.full(scales.shape, 8 if kind == "4 bits" else 128)
        held = {"codes": codes.astype(dtype), "scales": scales, "zeros": zeros.astype(dtype)}
        place: dict[str, Any] = {"axis": 0, "block_size": GROUP} if blocks else {"axis": 1}
        nodes.insert(0, helper.make_node("DequantizeLinear", list(held), ["weight"], **place))
    if kind == "bytes":
        held |= {"step": np.array(0.05, np.float32), "middle": np.array(0, np.int8)}
        pair = (("QuantizeLinear", "x", "rounded"), ("DequantizeLinear", "rounded", "given"))
        nodes[:0] = [helper.make_node(op, [given, "step", "middle"], [made]) for op, given, made in pair]
    else:
        nodes.insert(0, helper.make_node("Identity", ["x"], ["given"]))
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", INPUTS), ("y", OUTPUTS))
    )
    tensors = [numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = helper.make_graph(nodes, "product", [x], [y], tensors)
    opset = [helper.make_opsetid("", 23)]
    return helper.make_model(graph, opset_imports=opset, ir_version=11).SerializeToString()
