"""Where the end of a text occurred before."""

import torch
from torch import Tensor

from tokopt.kernels.shared import refuse

WORDS = 3
"""Entries of the end that are looked for at most."""


def latest_repeat(text: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The newest place before ``end`` of what agrees longest with the entries up to ``end``, three at most.

    A place p agrees in n entries where ``text[p - n + 1 .. p]`` is ``text[end - n + 1 .. end]``.

    Args:
        text: [batch, size] int32; only entries up to ``end`` count.
        end: [batch] int64 below size, the place of the last entry; negative where there is none.

    Returns:
        The place [batch] int64 and the number of entries that agree [batch] int64; -1 and 0 where none does.

    Raises:
        InputError: numbers of dimensions that disagree.
    """
    check(text, end)
    size = text.shape[1]
    place = torch.arange(size, device=text.device)
    before = place < end[:, None]
    agree, length = before, torch.zeros_like(text, dtype=torch.int64)
    for back in range(WORDS):
        here = text.gather(1, (end - back).clamp_min(0)[:, None])
        agree = agree & (text.roll(back, 1) == here) & (place >= back)
        length = length + agree
    best, found = (length * size + place).max(1)
    agreed = best // max(size, 1)
    return torch.where(agreed > 0, found, -1), agreed


def fake(text: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Empty outputs of the right shape."""
    check(text, end)
    return torch.empty_like(end), torch.empty_like(end)


def check(text: Tensor, end: Tensor) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        (text.ndim, end.ndim) != (2, 1),
        f"tokopt::latest_repeat: text must be [batch, size] and end [batch], got {text.ndim} and {end.ndim} "
        "dimensions.",
    )
