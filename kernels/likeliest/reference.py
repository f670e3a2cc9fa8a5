"""The likeliest tokens."""

import torch
from torch import Tensor

from tokopt.kernels.shared import refuse


def likeliest(logits: Tensor, count: int) -> Tensor:
    """The ``count`` tokens of the largest logits, largest first; which of equal ones come is not said.

    Args:
        logits: [batch, rows, vocabulary], any float dtype.
        count: at most the vocabulary.

    Returns:
        [batch, rows, count] int64.

    Raises:
        InputError: logits that are not three-dimensional, or a count out of range.
    """
    check(logits, count)
    return logits.float().topk(count, dim=-1).indices


def fake(logits: Tensor, count: int) -> Tensor:
    """An empty output of the right shape."""
    check(logits, count)
    return logits.new_empty((*logits.shape[:2], count), dtype=torch.int64)


def check(logits: Tensor, count: int) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        logits.ndim != 3,
        f"tokopt::likeliest: logits must be [batch, rows, vocabulary], got {logits.ndim} dimensions.",
    )
    refuse(
        not 1 <= count <= logits.shape[-1],
        f"tokopt::likeliest: count={count} must be 1 to the {logits.shape[-1]} tokens of the vocabulary.",
    )
