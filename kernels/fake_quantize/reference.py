"""Activations rounded to what 8 bits can hold."""

from torch import Tensor

from tokopt.kernels.shared import refuse

LOW, HIGH = -128, 127
"""The codes of 8 bits with a sign."""


def fake_quantize(x: Tensor, scale: float, zero: int) -> Tensor:
    """``(clamp(round(x / scale) + zero, -128, 127) - zero) * scale``; ties round to even.

    Args:
        x: any shape, floating point.
        scale: the step between two codes.
        zero: the code of 0.

    Returns:
        As ``x``.

    Raises:
        InputError: a scale that is not positive, or a zero point outside the codes.
    """
    check(x, scale, zero)
    return (((x / scale).round() + zero).clamp(LOW, HIGH) - zero) * scale


def fake(x: Tensor, scale: float, zero: int) -> Tensor:
    """An empty output of the right shape."""
    check(x, scale, zero)
    return x.new_empty(x.shape)


def check(x: Tensor, scale: float, zero: int) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(not scale > 0, f"tokopt::fake_quantize: scale={scale} must be positive.")
    refuse(not LOW <= zero <= HIGH, f"tokopt::fake_quantize: zero={zero} must be {LOW} to {HIGH}.")
