"""Activations rounded to what floats of 8 bits can hold."""

import torch
from torch import Tensor

from tokopt.kernels.shared import refuse

LARGEST = 448.0
"""The largest number of E4M3; it has no infinity."""


def fake_float8(x: Tensor, scale: float) -> Tensor:
    """``x / scale`` as the nearest number of E4M3, times ``scale``; ties go to the even one, NaN stays.

    E4M3 (Micikevicius et al., *FP8 Formats for Deep Learning*, arXiv 2209.05433; ``float8_e4m3fn`` of PyTorch) has a
    sign, 4 bits of exponent and 3 of mantissa. What is beyond its largest number, 448, becomes that number.

    Args:
        x: any shape, floating point.
        scale: what 1 stands for.

    Returns:
        As ``x``.

    Raises:
        InputError: a scale that is not positive.
    """
    check(scale)
    return to_float8(x / scale).to(x.dtype) * scale


def to_float8(x: Tensor) -> Tensor:
    """The nearest numbers of E4M3."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def fake(x: Tensor, scale: float) -> Tensor:
    """An empty output of the right shape."""
    check(scale)
    return x.new_empty(x.shape)


def check(scale: float) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(not scale > 0, f"tokopt::fake_float8: scale={scale} must be positive.")
