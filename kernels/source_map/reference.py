"""The slot that every old token went to."""

import torch
from torch import Tensor

from tokopt.kernels.shared import leading, refuse


def source_map(keep: Tensor, drop: Tensor, dest: Tensor) -> Tensor:
    """Invert a merge: ``source[keep_k] = k`` and ``source[drop_j] = dest_j``.

    ``keep`` and ``drop`` together name every old token once, so ``gather_tokens(merged, source, 1)`` puts the
    merged tokens back on the old grid.

    Args:
        keep: [batch, kept] int64, old indices in the new order.
        drop: [batch, r] int64, old indices.
        dest: [batch, r] int64, slots in the new order.

    Returns:
        ``source`` [batch, kept + r] int64, the slot of every old token.

    Raises:
        InputError: numbers of dimensions or of dropped tokens that disagree.
    """
    check(keep, drop, dest)
    old = torch.cat([keep, drop], dim=1)
    return torch.empty_like(old).scatter(1, old, torch.cat([leading(keep, keep.shape[1]), dest], dim=1))


def fake(keep: Tensor, drop: Tensor, dest: Tensor) -> Tensor:
    """An empty output of the right shape."""
    check(keep, drop, dest)
    return keep.new_empty((keep.shape[0], keep.shape[1] + drop.shape[1]))


def check(keep: Tensor, drop: Tensor, dest: Tensor) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        (keep.ndim, drop.ndim, dest.ndim) != (2, 2, 2),
        "tokopt::source_map: keep, drop and dest must be [batch, tokens].",
    )
    refuse(
        drop.shape[1] != dest.shape[1],
        f"tokopt::source_map: {drop.shape[1]} drops and {dest.shape[1]} dests; each drop needs one dest.",
    )
