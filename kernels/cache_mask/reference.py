"""Which slots of a cache a new token sees."""

import torch
from torch import Tensor

from tokopt.kernels.shared import refuse


def cache_mask(slots: Tensor, positions: Tensor, own: Tensor, length: Tensor, window: int) -> Tensor:
    """The attention mask of new tokens over a cache that they have just been written into.

    A new token sees every slot that held a token before, of the new tokens those that ``own`` lets it see,
    and always itself. ``window`` > 0 hides what is ``window`` or more positions away (sliding attention).
    Empty slots and padding have position -1 and are hidden.

    Args:
        slots: [batch, heads, slots, 1] int64, the position of the token in each slot, laid out like keys of
            one channel; -1 in a free slot and for padding. What it says of the new tokens' slots is not read.
        positions: [batch, tokens] int64, positions of the new tokens, -1 for padding.
        own: [batch, tokens, tokens] bool, which new token (row) sees which (column); causal, or a tree.
        length: [batch] int64, the slot of the first new token.
        window: sliding window in positions, 0 for none.

    Returns:
        [batch, heads, tokens, slots] bool.

    Raises:
        InputError: numbers of dimensions that disagree, or a negative window.
    """
    check(slots, positions, own, length, window)
    tokens, capacity = positions.shape[1], slots.shape[2]
    held = slots.mT
    past = (held >= 0).expand(-1, -1, tokens, -1)
    if window:
        past = past & (positions[:, None, :, None] - held < window)
        own = own & (positions[:, :, None] - positions[:, None, :] < window)
    itself = torch.eye(tokens, dtype=torch.bool, device=own.device)
    own = own & (positions >= 0)[:, None, :] | itself
    column = torch.arange(capacity, device=own.device) - length[:, None]  # the new token in each slot
    written = (column >= 0) & (column < tokens)
    index = column.clamp(0, tokens - 1)[:, None, :].expand(-1, tokens, -1)
    return torch.where(written[:, None, None, :], own.gather(2, index)[:, None], past)


def fake(slots: Tensor, positions: Tensor, own: Tensor, length: Tensor, window: int) -> Tensor:
    """An empty output of the right shape."""
    check(slots, positions, own, length, window)
    return own.new_empty((*slots.shape[:2], positions.shape[1], slots.shape[2]))


def check(slots: Tensor, positions: Tensor, own: Tensor, length: Tensor, window: int) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        (slots.ndim, positions.ndim, own.ndim, length.ndim) != (4, 2, 3, 1),
        "tokopt::cache_mask: slots must be [batch, heads, slots, 1], positions [batch, tokens], own "
        "[batch, tokens, tokens] and length [batch].",
    )
    refuse(window < 0, f"tokopt::cache_mask: window={window} is negative; 0 is none.")
