"""Keys or values back from 8 bits."""

from torch import Tensor

from tokopt.kernels.shared import refuse


def dequantize_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """``codes * scale``.

    Args:
        codes: [batch, heads, slots, channels] int8.
        scale: [heads, 1, channels] floating point.

    Returns:
        [batch, heads, slots, channels] in the dtype of ``scale``.

    Raises:
        InputError: numbers of dimensions or sizes that do not fit.
    """
    check(codes, scale)
    return codes.to(scale.dtype) * scale


def fake(codes: Tensor, scale: Tensor) -> Tensor:
    """An empty output of the right shape."""
    check(codes, scale)
    return scale.new_empty(codes.shape)


def check(codes: Tensor, scale: Tensor) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        codes.ndim != 4 or scale.ndim != 3 or tuple(scale.shape) != (codes.shape[1], 1, codes.shape[3]),
        f"tokopt::dequantize_int8: codes must be [batch, heads, slots, channels] and scale [heads, 1, channels], got "
        f"{list(codes.shape)} and {list(scale.shape)}.",
    )
