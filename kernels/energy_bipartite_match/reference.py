"""Bipartite matching of tokens in the order of their energies, the selection step of PiToMe's vision models."""

import torch
from torch import Tensor

from tokopt.kernels.bipartite_match.reference import bipartite_match
from tokopt.kernels.shared import check_match, empty_match, energies, leading, ranked, rows, unit


def energy_bipartite_match(
    metric: Tensor, size: Tensor, r: int, prefix: int, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the ``r`` pairs of most similar tokens to merge, between tokens of even and of odd rank.

    The code published with PiToMe (arXiv 2405.16148) does this in half of the blocks of a vision transformer. All
    unprotected tokens are ranked by the energy of :func:`tokopt.kernels.energy_match.reference.energy_match`, the
    highest first: even ranks form A, odd ones B. Each a in A has one edge, to ``argmax_b cos(a, b)``; the ``r`` edges
    of highest cosine merge a into b.

    Padding (``size`` 0) ranks first; then it is treated as in
    :func:`tokopt.kernels.bipartite_match.reference.bipartite_match`. Ties go to the lowest index, in matches to the
    highest energy.

    Args:
        metric: [batch, tokens, channels], any float dtype; compared in float32. PiToMe takes the attention
            keys averaged over heads.
        size: [batch, tokens] float32, how many original tokens each token stands for; 0 marks padding.
        r: tokens to remove, at most ``(tokens - prefix) // 2``.
        prefix: leading tokens that are never merged.
        margin: the similarity above which a neighbour counts as close, ``m`` in the paper.

    Returns:
        ``keep`` [batch, tokens - r], old indices in the new order: prefix, unmerged A by rank, B by rank.
        ``drop`` [batch, r], old indices of the merged a, best edge first.
        ``dest`` [batch, r], the new slot of each dropped token's b. All int64.

    Raises:
        InputError: shapes that disagree, fewer than two unprotected tokens, ``r`` or ``prefix`` out of range.
    """
    check_match("energy_bipartite_match", metric, size, r, prefix)
    metric, size = metric[:, prefix:], size[:, prefix:]
    order = ranked(energies(unit(metric), size > 0, margin))
    keep, drop, dest = bipartite_match(rows(metric, order), size.gather(1, order), r, 0)
    keep, drop = order.gather(1, keep), order.gather(1, drop)
    return torch.cat([leading(metric, prefix), prefix + keep], dim=1), prefix + drop, prefix + dest


def fake(metric: Tensor, size: Tensor, r: int, prefix: int, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs of the right shapes."""
    check_match("energy_bipartite_match", metric, size, r, prefix)
    return empty_match(size, r)
