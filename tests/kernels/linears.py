"""Block-quantized linears: random ones, what they compute in float64, and every form of the op behind one call.

Needs no torch outside of the reference, so that the sanitizers need not follow it.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from tokopt.kernels import cpu

LIBRARY = Path(os.environ["TOKOPT_TEST_LIBRARY"]) if "TOKOPT_TEST_LIBRARY" in os.environ else cpu.library()
"""The library under test: the installed one, or one that was built with sanitizers."""

FAILURES = (Fail, InvalidArgument, RuntimeException)
"""What ONNX Runtime raises when an op refuses a node or its input."""

needs_library = pytest.mark.skipif(LIBRARY is None, reason=cpu.problem())


def packed_bytes() -> int:
    """Bytes of packed weights that the library under test holds for all sessions of this process."""
    count = ctypes.CDLL(str(LIBRARY)).tokopt_cpu_packed_bytes
    count.restype = ctypes.c_size_t
    return count()


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    return float(((got - want) ** 2).sum() / max((want**2).sum(), 1e-30))


def unaligned(x: np.ndarray) -> np.ndarray:
    """The same numbers one byte past where numbers of their type lie."""
    return np.frombuffer(b"_" + x.tobytes(), x.dtype, offset=1).reshape(x.shape) if x.size else x


CONSTANTS = ("codes", "scale", "zero", "minimum", "bias")


@dataclass(frozen=True)
class Linear:
    """The constants of the op by name, and its attributes; ``bits`` and ``group`` may be wrong on purpose."""

    constants: Mapping[str, np.ndarray]
    bits: int
    group: int
    gate: str = ""

    @property
    def attributes(self) -> dict[str, Any]:
        return {"bits": self.bits, "group": self.group} | ({"gate": self.gate} if self.gate else {})

    @property
    def inputs(self) -> int:
        return self.constants["codes"].shape[1] * 8 // self.bits

    def but(self, **constants: np.ndarray | None) -> Linear:
        """With other constants; None removes one."""
        changed = {**self.constants, **constants}
        return replace(self, constants={name: given for name, given in changed.items() if given is not None})


def random_linear(
    seed: int,
    outputs: int,
    groups: int,
    *,
    bits: int = 4,
    group: int = 32,
    offset: str = "symmetric",
    half: bool = True,
    bias: bool = False,
    gate: str = "",
) -> Linear:
    """Codes, scales and offsets at random; ``offset`` is symmetric, zero or minimum."""
    random = np.random.default_rng(seed)
    dtype = np.float16 if half else np.float32
    shape = (outputs, groups)
    constants = {
        "codes": random.integers(0, 256, (outputs, groups * group * bits // 8), dtype=np.uint8),
        "scale": random.uniform(-0.1, 0.1, shape).astype(dtype),
    }
    if offset == "zero":
        constants["zero"] = random.integers(0, 2**bits, shape, dtype=np.uint8)
    if offset == "minimum":
        constants["minimum"] = random.uniform(-1, 1, shape).astype(dtype)
    if bias:
        constants["bias"] = random.standard_normal(outputs).astype(np.float32)
    return Linear(constants, bits, group, gate)


def random_rows(seed: int, rows: int, linear: Linear) -> np.ndarray:
    """``x`` [rows, in] of numbers far from half-way between two steps: every arithmetic rounds them alike."""
    random = np.random.default_rng(seed)
    shape = (rows, linear.inputs // linear.group, linear.group)
    whole = random.integers(-126, 127, shape) + random.uniform(-0.4, 0.4, shape)
    whole[..., random.integers(linear.group)] = 127 * random.choice([-1, 1])
    steps = np.exp(random.normal(0, 3, (*shape[:2], 1)))
    return (whole * steps).astype(np.float32).reshape(rows, linear.inputs)


def naive(linear: Linear, x: np.ndarray) -> np.ndarray:
    """The op in float64: ``x`` [..., in] -> [..., out], one sentence of the definition a line."""
    constants, bits, group = linear.constants, linear.bits, linear.group
    packed = constants["codes"]
    codes = np.stack([packed % 16, packed // 16], axis=-1).reshape(len(packed), -1) if bits == 4 else packed
    codes = codes.reshape(len(packed), -1, group).astype(np.float64)
    scale = constants["scale"].astype(np.float64)[..., None]
    if "minimum" in constants:
        weight = codes * scale + constants["minimum"].astype(np.float64)[..., None]
    else:
        zero = constants["zero"][..., None].astype(np.float64) if "zero" in constants else 2.0 ** (bits - 1)
        weight = (codes - zero) * scale
    grouped = x.astype(np.float64).reshape(*x.shape[:-1], x.shape[-1] // group, group)
    step = np.abs(grouped).max(-1, keepdims=True) / 127
    step[step < np.finfo(np.float32).tiny] = 0
    step[~np.isfinite(step)] = np.nan
    rounded = np.rint(np.divide(grouped, step, out=np.zeros_like(grouped), where=step != 0)) * step
    y = np.einsum("...gi,ogi->...o", rounded, weight)
    y = y + constants["bias"] if "bias" in constants else y
    if not linear.gate:
        return y
    gates, up = np.split(y, 2, axis=-1)
    return ACTIVATIONS[linear.gate](gates) * up


def _logistic(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x * _logistic(x),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def onnx_model(linear: Linear, *, computed: str = "", **attributes: Any) -> ModelProto:
    """One node of the op; ``computed`` names a constant that becomes an input of the model."""
    return one_node(
        "QuantizedLinear", CONSTANTS, linear.constants, attributes or dict(linear.attributes), computed
    )


def one_node(
    op: str,
    names: Sequence[str],
    constants: Mapping[str, np.ndarray],
    attributes: dict[str, Any],
    computed: str,
) -> ModelProto:
    """A model of one op of ``x`` and of constants, ``names`` in their order; ``computed`` becomes an input."""
    given = {name: array for name, array in constants.items() if name != computed}
    inputs = ["x", *(name if name in constants else "" for name in names)]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(op, inputs, ["y"], name="proj", domain=cpu.DOMAIN, **attributes)
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    if computed:
        array = constants[computed]
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        values.append(helper.make_tensor_value_info(computed, kind, array.shape))
    graph = helper.make_graph(
        [node],
        "linear",
        values,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in given.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(cpu.DOMAIN, cpu.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def chosen_model(
    op: str,
    names: Sequence[str],
    constants: Mapping[str, np.ndarray],
    attributes: Mapping[str, Any],
    *,
    share: bool,
) -> ModelProto:
    """A model of one op of ``x``, of the experts that are ``chosen`` and of constants, ``names`` in their order."""
    inputs = [
        "x",
        "chosen",
        *(name if name in constants else "" for name in names),
        *(["share"] if share else []),
    ]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(op, inputs, ["y"], name="experts", domain=cpu.DOMAIN, **attributes)
    kinds = {"x": TensorProto.FLOAT, "chosen": TensorProto.INT64, "share": TensorProto.FLOAT}
    graph = helper.make_graph(
        [node],
        "experts",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items() if name in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(cpu.DOMAIN, cpu.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(model: ModelProto | Path, isa: str = "", threads: int = 1) -> onnxruntime.InferenceSession:
    """A session of the library under test, of a model or its file; ``isa`` is forced."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with patch.dict(os.environ, {"TOKOPT_ISA": isa}):
        options.register_custom_ops_library(str(LIBRARY))
    given = model if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


on_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="asks Linux which pages of a file are in memory"
)


def sessions_of_a_file(model: ModelProto, folder: Path) -> tuple[list[onnxruntime.InferenceSession], float]:
    """Two sessions of one file, and how much of the weights' file beside it is in memory, as a share of it."""
    weights = folder / "weights.data"
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location=weights.name)
    sessions = [session(folder / "model.onnx") for _ in range(2)]
    found, held = {"Rss:": 0, "Size:": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if line[0] in "0123456789abcdef":
            held = line.endswith(str(weights))
        elif held and name in found:
            found[name] += int(rest[0])
    assert found["Size:"] * 1024 >= 2 * weights.stat().st_size
    return sessions, found["Rss:"] / found["Size:"]


def reference_form(linear: Linear, x: np.ndarray, threads: int) -> np.ndarray:
    import torch

    from tokopt.kernels.quantized_linear.reference import quantized_linear

    constants: dict[str, Any] = {name: torch.from_numpy(array) for name, array in linear.constants.items()}
    return quantized_linear(torch.from_numpy(x), **constants, **linear.attributes).numpy()


def library_form(isa: str) -> Callable[[Linear, np.ndarray, int], np.ndarray]:
    def run(linear: Linear, x: np.ndarray, threads: int) -> np.ndarray:
        (y,) = session(onnx_model(linear), isa, threads).run(None, {"x": x})
        return np.asarray(y)

    return run


FORMS: dict[str, Callable[[Linear, np.ndarray, int], np.ndarray]] = {
    "reference": reference_form,
    **({f"library-{isa}": library_form(isa) for isa in cpu.isas()} if LIBRARY else {}),
}
"""``(linear, x [..., in], threads) -> y [..., out]``: the reference, and the library on each instruction set."""
