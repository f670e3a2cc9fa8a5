"""Bipartite soft matching of tokens, the selection step of ToMe."""

import torch
from torch import Tensor

from tokopt.kernels.shared import MISMATCH, check_match, empty_match, leading, ranked, unit


def bipartite_match(metric: Tensor, size: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the ``r`` pairs of most similar tokens to merge (ToMe, arXiv 2210.09461).

    The tokens from ``prefix`` on are split by the parity of their index: even ones form A, odd ones B. Each
    a in A has one edge, to ``argmax_b cos(a, b)``; the ``r`` edges of highest cosine merge a into b.

    Padding (``size`` 0): a padding a scores +inf, so it goes first and costs nothing; it joins the first
    padding b, or the first b if there is none, which it leaves unchanged. A real a joins a padding b only if
    B has no real token. Ties go to the lowest index.

    Args:
        metric: [batch, tokens, channels], any float dtype; compared in float32. ToMe takes the attention keys
            averaged over heads.
        size: [batch, tokens] float32, how many original tokens each token stands for; 0 marks padding.
        r: tokens to remove, at most ``(tokens - prefix) // 2``.
        prefix: leading tokens that are never merged.

    Returns:
        ``keep`` [batch, tokens - r], old indices in the new order: prefix, unmerged A ascending, B ascending.
        ``drop`` [batch, r], old indices of the merged a, best edge first.
        ``dest`` [batch, r], the new slot of each dropped token's b. All int64.

    Raises:
        InputError: shapes that disagree, fewer than two unprotected tokens, ``r`` or ``prefix`` out of range.
    """
    check_match("bipartite_match", metric, size, r, prefix)
    first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2
    vector, padding = unit(metric), size == 0
    a, b = vector[:, first_a::2], vector[:, first_b::2]
    padding_a, padding_b = padding[:, first_a::2], padding[:, first_b::2]
    best, partner = (a @ b.mT - MISMATCH * padding_b[:, None, :]).max(dim=-1)
    partner = torch.where(padding_a, padding_b.int().argmax(dim=-1, keepdim=True), partner)
    order = ranked(best.masked_fill(padding_a, torch.inf))
    merged, rest = order[:, :r], order[:, r:].sort(dim=-1).values
    keep = [leading(metric, prefix), first_a + 2 * rest, first_b + 2 * leading(metric, b.shape[1])]
    dest = prefix + rest.shape[1] + partner.gather(1, merged)
    return torch.cat(keep, dim=1), first_a + 2 * merged, dest


def fake(metric: Tensor, size: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs of the right shapes."""
    check_match("bipartite_match", metric, size, r, prefix)
    return empty_match(size, r)
