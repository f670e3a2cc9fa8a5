"""8-bit linears: random ones, what they compute in float64, and every form of the op behind one call.

Needs no torch outside of the reference, so that the sanitizers need not follow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx import ModelProto

from tests.kernels.linears import LIBRARY, one_node, session
from tokopt.kernels import cpu

CONSTANTS = ("codes", "scale", "bias")


@dataclass(frozen=True)
class Int8Linear:
    """The constants of the op by name, and its attributes; either may be wrong on purpose."""

    constants: Mapping[str, np.ndarray]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        return self.constants["codes"].shape[0]

    def but(self, **constants: np.ndarray | None) -> Int8Linear:
        """With other constants; None removes one."""
        changed = {**self.constants, **constants}
        return replace(self, constants={name: given for name, given in changed.items() if given is not None})

    def saying(self, **attributes: float | str | None) -> Int8Linear:
        """With other attributes; None removes one."""
        changed = {**self.attributes, **attributes}
        return replace(self, attributes={name: given for name, given in changed.items() if given is not None})


def random_int8_linear(
    seed: int, inputs: int, outputs: int, *, bias: bool = True, **attributes: Any
) -> Int8Linear:
    """Codes, scales and bias at random."""
    random = np.random.default_rng(seed)
    constants = {
        "codes": random.integers(0, 256, (inputs, outputs), dtype=np.uint8),
        "scale": (random.uniform(-1, 1, outputs) / (74 * math.sqrt(inputs))).astype(np.float32),
    }
    if bias:
        constants["bias"] = random.standard_normal(outputs).astype(np.float32)
    return Int8Linear(constants, attributes)


def random_rows(seed: int, rows: int, linear: Int8Linear) -> np.ndarray:
    """``x`` [rows, in] of numbers far from half-way between two steps: every arithmetic rounds them alike.

    Some lie beyond the first and the last code.
    """
    random = np.random.default_rng(seed)
    shape = (rows, linear.inputs)
    if "step" in linear.attributes:
        codes = random.integers(-20, 276, shape) + random.uniform(-0.4, 0.4, shape)
        return ((codes - linear.attributes["zero"]) * linear.attributes["step"]).astype(np.float32)
    whole = random.integers(-126, 127, shape) + random.uniform(-0.4, 0.4, shape)
    whole[:, random.integers(linear.inputs)] = 127 * random.choice([-1, 1])
    return (whole * np.exp(random.normal(0, 3, (rows, 1)))).astype(np.float32)


def naive(linear: Int8Linear, x: np.ndarray) -> np.ndarray:
    """The op in float64: ``x`` [..., in] -> [..., out], one sentence of the definition a line."""
    constants, attributes = linear.constants, linear.attributes
    weight = (constants["codes"].astype(np.float64) - 128) * constants["scale"]
    x = x.astype(np.float64)
    if "step" in attributes:
        step, zero = np.float32(attributes["step"]), attributes["zero"]
        rounded = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    else:
        step = np.maximum(np.abs(x).max(-1, keepdims=True) / 127, 1e-30)
        rounded = np.rint(x / step) * step
    y = rounded @ weight + constants.get("bias", 0.0)
    if attributes.get("activation") == "gelu":
        return 0.5 * y * (1 + np.vectorize(math.erf, otypes=[float])(y / math.sqrt(2)))
    if attributes.get("activation") == "gelu_tanh":
        return 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return y


def onnx_model(linear: Int8Linear, *, computed: str = "") -> ModelProto:
    """One node of the op; ``computed`` names a constant that becomes an input of the model."""
    return one_node("Int8Linear", CONSTANTS, linear.constants, dict(linear.attributes), computed)


def reference_form(linear: Int8Linear, x: np.ndarray, threads: int) -> np.ndarray:
    import torch

    from tokopt.kernels.int8_linear.reference import Grid, int8_linear

    constants: dict[str, Any] = {name: torch.from_numpy(array) for name, array in linear.constants.items()}
    given: dict[str, Any] = dict(linear.attributes)
    grid = Grid(given["step"], given["zero"]) if "step" in given else None
    activation = given.get("activation", "")
    return int8_linear(torch.from_numpy(x), **constants, grid=grid, activation=activation).numpy()


def library_form(isa: str) -> Callable[[Int8Linear, np.ndarray, int], np.ndarray]:
    def run(linear: Int8Linear, x: np.ndarray, threads: int) -> np.ndarray:
        (y,) = session(onnx_model(linear), isa, threads).run(None, {"x": x})
        return np.asarray(y)

    return run


FORMS: dict[str, Callable[[Int8Linear, np.ndarray, int], np.ndarray]] = {
    "reference": reference_form,
    **({f"library-{isa}": library_form(isa) for isa in cpu.isas()} if LIBRARY else {}),
}
"""``(linear, x [..., in], threads) -> y [..., out]``: the reference, and the library on each instruction set."""
