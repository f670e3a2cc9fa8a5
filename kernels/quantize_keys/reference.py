"""Keys in 8 bits, one scale per channel and group of tokens."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokopt.kernels.shared import refuse

LEVELS = 255
"""Steps between the smallest and the largest code of 8 bits."""


def quantize_keys(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize every channel over groups of tokens (KIVI, arXiv 2402.02750): ``code = round((x - zero) / scale)``.

    ``zero`` is the smallest value of the group and ``scale`` the range over 255, so the error is at most half a
    scale, and what was quantized before is reproduced. Slots after the last whole group get zeros.

    Args:
        x: [batch, heads, slots, channels] float32.
        group: slots per group; divides the channels.

    Returns:
        codes: [batch, heads, slots, channels] uint8.
        scale: [batch, heads, slots, channels / group] float32: the ``channels`` scales of a group, in order, are
            spread over its ``group`` slots, so that everything grows with the slots.
        zero: as ``scale``.

    Raises:
        InputError: ``x`` not four-dimensional, or a group that does not divide the channels.
    """
    check(x, group)
    whole = x.shape[2] // group
    grouped = x[:, :, : whole * group].unflatten(2, (whole, group))
    zero, high = grouped.amin(3, keepdim=True), grouped.amax(3, keepdim=True)
    scale = (high - zero) / LEVELS
    codes = ((grouped - zero) / torch.where(scale > 0, scale, 1.0)).round().clamp(0, LEVELS)
    rest, spread = (0, 0, 0, x.shape[2] - whole * group), (*x.shape[:2], whole * group, x.shape[3] // group)
    scale, zero = (pad(v.reshape(spread), rest) for v in (scale, zero))
    return pad(codes.to(torch.uint8).flatten(2, 3), rest), scale, zero


def fake(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs of the right shapes."""
    check(x, group)
    spread = (*x.shape[:3], x.shape[3] // group)
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(spread), x.new_empty(spread)


def check(x: Tensor, group: int) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        x.ndim != 4,
        f"tokopt::quantize_keys: x must be [batch, heads, slots, channels], got {x.ndim} dimensions.",
    )
    refuse(
        group < 1 or x.shape[-1] % max(group, 1) != 0,
        f"tokopt::quantize_keys: group={group} does not divide the {x.shape[-1]} channels.",
    )
