"""Keys or values in 8 bits, with scales that are known beforehand."""

import torch
from torch import Tensor

from tokopt.kernels.shared import refuse

LOW, HIGH = -128, 127
"""The smallest and the largest code."""


def quantize_int8(x: Tensor, scale: Tensor) -> Tensor:
    """``clamp(round(x / scale), -128, 127)``; ties round to even.

    Args:
        x: [batch, heads, tokens, channels] floating point.
        scale: [heads, 1, channels] in the dtype of ``x``, positive.

    Returns:
        [batch, heads, tokens, channels] int8.

    Raises:
        InputError: numbers of dimensions or sizes that do not fit.
    """
    check(x, scale)
    return (x / scale).round().clamp(LOW, HIGH).to(torch.int8)


def fake(x: Tensor, scale: Tensor) -> Tensor:
    """An empty output of the right shape."""
    check(x, scale)
    return x.new_empty(x.shape, dtype=torch.int8)


def check(x: Tensor, scale: Tensor) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        x.ndim != 4 or scale.ndim != 3 or tuple(scale.shape) != (x.shape[1], 1, x.shape[3]),
        f"tokopt::quantize_int8: x must be [batch, heads, tokens, channels] and scale [heads, 1, channels], got "
        f"{list(x.shape)} and {list(scale.shape)}.",
    )
