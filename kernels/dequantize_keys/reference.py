"""Keys back from 8 bits."""

from torch import Tensor
from torch.nn.functional import pad

from tokopt.kernels.shared import refuse


def dequantize_keys(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """``codes * scale + zero`` with the scales of :func:`tokopt.kernels.quantize_keys.reference.quantize_keys`.

    Args:
        codes: [batch, heads, slots, channels] uint8.
        scale: [batch, heads, slots, channels / group] float32.
        zero: as ``scale``.

    Returns:
        [batch, heads, slots, channels] float32; zeros in slots after the last whole group.

    Raises:
        InputError: tensors that are not four-dimensional.
    """
    check(codes, scale, zero)
    outer, slots, channels = codes.shape[:2], codes.shape[2], codes.shape[3]
    group = channels // scale.shape[3]
    whole = slots // group
    grouped = codes[:, :, : whole * group].float().unflatten(2, (whole, group))
    scale, zero = (v[:, :, : whole * group].reshape(*outer, whole, 1, channels) for v in (scale, zero))
    return pad((grouped * scale + zero).flatten(2, 3), (0, 0, 0, slots - whole * group))


def fake(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """An empty output of the right shape."""
    check(codes, scale, zero)
    return scale.new_empty(codes.shape)


def check(codes: Tensor, scale: Tensor, zero: Tensor) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        (codes.ndim, scale.ndim, zero.ndim) != (4, 4, 4),
        "tokopt::dequantize_keys: codes, scale and zero must be [batch, heads, slots, channels], got "
        f"{codes.ndim}, {scale.ndim} and {zero.ndim} dimensions.",
    )
