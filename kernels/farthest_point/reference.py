"""Greedy farthest-point selection of tokens: DivPrune and the k-center stage of ToDRE."""

import torch
from torch import Tensor

from tokopt.kernels.shared import check_pair, check_removal, leading, ranked, refuse, unit

METHODS = ("divprune", "kcenter")


def farthest_point(metric: Tensor, size: Tensor, r: int, prefix: int, method: str) -> tuple[Tensor, Tensor]:
    """Keep a diverse subset: repeatedly add the token farthest from all chosen ones.

    With d the distance and S the chosen set, the next token is ``argmax_i min_{s in S} d(i, s)``, until
    ``tokens - prefix - r`` unprotected tokens are chosen.

    - ``"divprune"`` (DivPrune, arXiv 2503.02175): ``d = 1 - cos``; the first token is the one whose nearest
      other token is farthest.
    - ``"kcenter"`` (ToDRE stage 1, arXiv 2505.18757 v1): Euclidean ``d``; the first token is the one nearest
      to the mean of the real tokens (our choice: deterministic, where the paper leaves the start open). The
      covering radius is at most twice the optimum.

    Padding (``size`` 0) is chosen after every real token and has no part in the first choice. Ties go to the
    lowest index.

    Args:
        metric: [batch, tokens, channels], any float dtype; distances in float32.
        size: [batch, tokens] float32; 0 marks padding.
        r: tokens to remove, at most ``tokens - prefix - 1``.
        prefix: leading tokens that are always kept and take no part.
        method: ``"divprune"`` or ``"kcenter"``.

    Returns:
        ``keep`` [batch, tokens - r]: prefix, then the chosen tokens ascending.
        ``drop`` [batch, r] ascending. Both int64 old indices.

    Raises:
        InputError: shapes that disagree, an unknown method, ``r`` or ``prefix`` out of range.
    """
    check(metric, size, r, prefix, method)
    real = size[:, prefix:] > 0
    distance, first = _distances(metric[:, prefix:].float(), real, method)
    # -inf on the diagonal takes a token out for good once chosen; -1 puts padding behind every real token.
    distance = distance.clamp_min(0).masked_fill(~real[:, None, :], -1.0)
    distance = distance.masked_fill(_diagonal(distance), -torch.inf)
    batch = torch.arange(real.shape[0], device=real.device)
    nearest = distance[batch, first]
    for _ in range(real.shape[1] - r - 1):
        nearest = torch.minimum(nearest, distance[batch, nearest.argmax(dim=-1)])
    order = ranked((nearest == -torch.inf).float())
    count = real.shape[1] - r
    keep = torch.cat([leading(metric, prefix), prefix + order[:, :count]], dim=1)
    return keep, prefix + order[:, count:]


def _distances(x: Tensor, real: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Distances that order like d [B, M, M], and the index of the first token [B]."""
    padding = ~real
    if method == "divprune":
        x = unit(x)
        distance = 1 - x @ x.mT
        others = distance.masked_fill(padding[:, None, :] | _diagonal(distance), torch.inf)
        start = others.amin(dim=-1)
    else:
        weight = real / real.sum(dim=-1, keepdim=True).clamp_min(1)
        # Centred, the squared norms are the distances to the mean, and the Gram matrix cancels less.
        x = x - weight[:, None, :] @ x
        norm = x.square().sum(dim=-1)
        distance = norm[:, :, None] + norm[:, None, :] - 2 * (x @ x.mT)
        start = -norm
    return distance, start.masked_fill(padding, -torch.inf).argmax(dim=-1)


def _diagonal(pairs: Tensor) -> Tensor:
    """Whether a pair of [B, M, M] is a token with itself: [M, M]."""
    token = torch.arange(pairs.shape[-1], device=pairs.device)
    return token[:, None] == token


def fake(metric: Tensor, size: Tensor, r: int, prefix: int, method: str) -> tuple[Tensor, Tensor]:
    """Empty outputs of the right shapes."""
    check(metric, size, r, prefix, method)
    batch, tokens = size.shape
    keep = size.new_empty((batch, tokens - r), dtype=torch.int64)
    return keep, size.new_empty((batch, r), dtype=torch.int64)


def check(metric: Tensor, size: Tensor, r: int, prefix: int, method: str) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        method not in METHODS,
        f"tokopt::farthest_point: unknown method {method!r}; use one of {', '.join(METHODS)}.",
    )
    check_pair("farthest_point", metric, size)
    tokens = size.shape[1]
    check_removal("farthest_point", tokens, r, prefix, limit=tokens - prefix - 1, at_least=1)
