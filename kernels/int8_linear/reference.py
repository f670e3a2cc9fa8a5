"""A linear layer with weights in 8 bits and activations that are rounded to 8 bits as they come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu

from tokopt.kernels.shared import refuse

SMALLEST = 1e-30
"""The smallest step of a row: a row of zeros stays one."""

MOST_INPUTS = 65536
"""Sums of that many products of bytes fit into 32 bits."""

ACTIVATIONS = {"": lambda x: x, "gelu": gelu, "gelu_tanh": lambda x: gelu(x, approximate="tanh")}
"""What may follow the bias."""


@dataclass(frozen=True)
class Grid:
    """The numbers that bytes stand for: ``(code - zero) * step``."""

    step: float
    zero: int

    def codes(self, x: Tensor) -> Tensor:
        """The nearest codes, ties to even, in the dtype of ``x``."""
        return ((x / self.step).round() + self.zero).clamp(0, 255)


def int8_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    grid: Grid | None = None,
    activation: str = "",
) -> Tensor:
    """``activation(x @ weight + bias)`` for weights ``(codes - 128) * scale`` and ``x`` rounded to bytes.

    With a ``grid`` all numbers of ``x`` are rounded to it. Without one every row has a step of its own,
    ``max(max|x| / 127, 1e-30)``, and zero is the code 128. Products of codes are summed exactly. A row that holds NaN
    is NaN, without a grid one with an infinity too.

    Args:
        x: [..., in] floating point; float64 is computed in float64.
        codes: [in, out] uint8.
        scale: [out] floating point.
        bias: [out] floating point.
        grid: the numbers that ``x`` is rounded to.
        activation: "", "gelu" or "gelu_tanh".

    Returns:
        [..., out] in the dtype of ``x``.

    Raises:
        InputError: sizes that do not fit, steps that are not positive.
    """
    check(x, codes, scale, bias, grid, activation)
    if grid is None:
        step = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=SMALLEST)
        step = torch.where(step.isfinite(), step, torch.nan)
        rounded = (x / step).round().clamp(-128, 127) * step
    else:
        rounded = (grid.codes(x) - grid.zero) * grid.step
    y = rounded @ ((codes.to(x.dtype) - 128) * scale.to(x.dtype))
    return ACTIVATIONS[activation](y if bias is None else y + bias.to(x.dtype))


def check(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    grid: Grid | None,
    activation: str,
) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(codes.ndim != 2 or x.ndim < 1, "int8_linear: codes must be [in, out] and x [..., in].")
    inputs, outputs = codes.shape
    refuse(not inputs or not outputs, f"int8_linear: codes {list(codes.shape)} are empty.")
    refuse(
        inputs > MOST_INPUTS,
        f"int8_linear: {inputs} inputs are more than {MOST_INPUTS}, whose products may not fit into 32 bits.",
    )
    refuse(x.shape[-1] != inputs, f"int8_linear: x has {x.shape[-1]} inputs and codes have {inputs}.")
    for name, given in (("scale", scale), ("bias", bias)):
        refuse(
            given is not None and tuple(given.shape) != (outputs,),
            f"int8_linear: {name} must be [out], {[outputs]} here.",
        )
    refuse(
        activation not in ACTIVATIONS,
        f"int8_linear: activation '{activation}' must be gelu, gelu_tanh or empty.",
    )
    if grid is not None:
        refuse(
            not SMALLEST <= grid.step <= 1 / SMALLEST,
            f"int8_linear: step={grid.step} must be a positive number.",
        )
        refuse(not 0 <= grid.zero <= 255, f"int8_linear: zero={grid.zero} must be 0 to 255.")
