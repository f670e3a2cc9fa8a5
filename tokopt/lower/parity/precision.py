"""The exported program in float64, which tells a wrong form from two forms that round differently.

A deep model with a few huge activations loses digits in float32 whoever computes it: SmolLM2's logits differ by an
NMSE of 3e-9 between two correct orders of summation. What such a program computes itself is that far from its own
float64 values, and no more can be asked of another form of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import Interpreter
from torch.utils._pytree import tree_map

from tokopt.ir.graph import dtype_name
from tokopt.ir.program import Program
from tokopt.runtime.numerics import LIMITS, nmse

ROUNDINGS = 64.0
"""How much larger another form's NMSE to the float64 values may be than the program's own: eight times the error.

ONNX Runtime's sums cost three times the error of torch's on SmolLM2 with 8-bit weights where vectors have 16 lanes, and
two to six times with 4-bit weights where they have 8, which makes each lane's sum longer.
"""

CEILING = 1e-5
"""The largest NMSE to the float64 values in any case: half a percent of error is no rounding of float32.

A program that is further from its own float64 values says nothing of another form: it may draw random numbers.
"""


def half_precision_limit(program: Program) -> float | None:
    """The largest NMSE that the half-precision dtype allows in which a program computes; None where it has none."""
    values = [node.meta.get("val") for node in program.module.graph.nodes]
    found = {dtype_name(value.dtype) for value in values if isinstance(value, torch.Tensor)}
    return max((LIMITS[dtype] for dtype in found & {"float16", "bfloat16"}), default=None)


def rounds_alike(
    program: Program,
    inputs: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    actual: Sequence[np.ndarray],
    names: Collection[str] | None = None,
) -> bool:
    """Whether ``actual`` is about as close to the float64 outputs as what the program itself gave (``expected``).

    Only the outputs ``names`` are looked at, by default all; those that are no float32 have to be equal. False when the
    program cannot be computed in float64.
    """
    try:
        exact = in_float64(program, inputs)
    except Exception:  # an op of the program that knows no float64
        return False
    return all_alike(program, exact, expected, actual, names)


def all_alike(
    program: Program,
    exact: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    actual: Sequence[np.ndarray],
    names: Collection[str] | None = None,
) -> bool:
    """Whether ``actual`` is about as close to the float64 outputs ``exact`` as ``expected`` is."""
    outputs = zip(program.outputs, exact, expected, actual, strict=True)
    return all(
        _alike(own, want, got) for spec, own, want, got in outputs if names is None or spec.name in names
    )


def in_float64(program: Program, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The outputs of the exported program with float64 in the place of float32."""
    with torch.no_grad():
        return InFloat64(program.module).run(*inputs)


def _alike(exact: torch.Tensor, expected: torch.Tensor, actual: np.ndarray) -> bool:
    if expected.dtype != torch.float32:
        return nmse(expected.numpy(force=True), actual) == 0.0
    wanted = exact.numpy(force=True)
    own = nmse(wanted, expected.double().numpy(force=True))
    return nmse(wanted, actual.astype(np.float64)) <= min(ROUNDINGS * own, CEILING)


class InFloat64(Interpreter):
    """Runs a graph with float64 wherever it says float32."""

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return widened(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return widened(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map(widened, (tuple(args), dict(kwargs)))
        return tree_map(widened, super().call_function(target, args, kwargs))


def widened(value: Any) -> Any:
    """Float64 in the place of float32, for a tensor and for the dtype."""
    if value is torch.float32:
        return torch.float64
    return value.double() if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value
