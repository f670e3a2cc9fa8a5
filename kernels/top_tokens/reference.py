"""Selection of the tokens of highest score, as EViT prunes."""

import torch
from torch import Tensor

from tokopt.kernels.shared import check_removal, leading, ranked, refuse


def top_tokens(score: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Keep the ``tokens - prefix - r`` unprotected tokens of highest score (EViT, arXiv 2202.07800).

    EViT's score is the attention of the class token to each token, averaged over heads. Callers give padding
    the score -inf. Ties go to the lowest index.

    Args:
        score: [batch, tokens], any float dtype; the scores of the prefix are ignored.
        r: tokens to remove, at most ``tokens - prefix``.
        prefix: leading tokens that are always kept.

    Returns:
        ``keep`` [batch, tokens - r]: prefix, then the best tokens, best first.
        ``drop`` [batch, r]: the others, best first. Both int64 old indices.

    Raises:
        InputError: a score that is not two-dimensional, ``r`` or ``prefix`` out of range.
    """
    check(score, r, prefix)
    order = prefix + ranked(score[:, prefix:].float())
    count = order.shape[1] - r
    return torch.cat([leading(score, prefix), order[:, :count]], dim=1), order[:, count:].clone()


def fake(score: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Empty outputs of the right shapes."""
    check(score, r, prefix)
    batch, tokens = score.shape
    keep = score.new_empty((batch, tokens - r), dtype=torch.int64)
    return keep, score.new_empty((batch, r), dtype=torch.int64)


def check(score: Tensor, r: int, prefix: int) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        score.ndim != 2, f"tokopt::top_tokens: score must be [batch, tokens], got {score.ndim} dimensions."
    )
    tokens = score.shape[1]
    check_removal("top_tokens", tokens, r, prefix, limit=tokens - prefix)
