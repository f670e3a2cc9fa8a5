"""Matching of the tokens of highest energy, the selection step of PiToMe's Algorithm 1."""

import torch
from torch import Tensor

from tokopt.kernels.shared import MISMATCH, check_match, empty_match, energies, leading, ranked, rows, unit


def energy_match(
    metric: Tensor, size: Tensor, r: int, prefix: int, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose ``r`` tokens of the densest regions to merge (PiToMe, arXiv 2405.16148, Algorithm 1).

    With s the cosine among unprotected tokens, token i has the energy ``E_i = mean_j ELU(s_ij - margin)``,
    ``ELU(x) = x if x > 0 else exp(x) - 1``. The ``2 r`` tokens of highest energy are mergeable: by rank,
    even ones form A and odd ones B, and every a merges into its most similar b.

    Padding (``size`` 0) is no j of the mean and has the energy +inf: it ranks first. Padding pairs with
    padding and real with real; the one exception is a padding a without a padding b, which merges into a real
    b and, having no size, leaves it unchanged. Ties go to the lowest index, among b to the highest energy.

    Args:
        metric: [batch, tokens, channels], any float dtype; compared in float32. PiToMe takes the attention
            keys averaged over heads.
        size: [batch, tokens] float32, how many original tokens each token stands for; 0 marks padding.
        r: tokens to remove, at most ``(tokens - prefix) // 2``.
        prefix: leading tokens that are never merged.
        margin: the similarity above which a neighbour counts as close, ``m`` in the paper.

    Returns:
        ``keep`` [batch, tokens - r], old indices in the new order: prefix, the rest ascending, B by rank.
        ``drop`` [batch, r], old indices of A by rank.
        ``dest`` [batch, r], the new slot of each dropped token's b. All int64.

    Raises:
        InputError: shapes that disagree, fewer than two unprotected tokens, ``r`` or ``prefix`` out of range.
    """
    check_match("energy_match", metric, size, r, prefix)
    vector, real = unit(metric[:, prefix:]), size[:, prefix:] > 0
    order = ranked(energies(vector, real, margin))
    a, b, rest = order[:, 0 : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :].sort(dim=-1).values
    keep = torch.cat([leading(metric, prefix), prefix + rest, prefix + b], dim=1)
    if r == 0:
        return keep, a.clone(), b.clone()
    score = rows(vector, a) @ rows(vector, b).mT
    score = score - MISMATCH * (real.gather(1, a)[:, :, None] != real.gather(1, b)[:, None, :])
    return keep, prefix + a, prefix + rest.shape[1] + score.argmax(dim=-1)


def fake(metric: Tensor, size: Tensor, r: int, prefix: int, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs of the right shapes."""
    check_match("energy_match", metric, size, r, prefix)
    return empty_match(size, r)
