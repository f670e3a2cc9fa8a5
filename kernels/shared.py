"""Checks and tensor helpers that the references of several token ops share."""

import torch
from torch import Tensor
from torch.nn.functional import elu

from tokopt.errors import InputError

TINY = torch.finfo(torch.float32).tiny
"""The smallest normal float32: a divisor that never turns 0 / 0 into NaN."""

MISMATCH = 4.0
"""Subtracted from the cosine of a padding and a real token: more than the whole range [-1, 1] of a cosine."""


def refuse(broken: object, sentence: str) -> None:
    """Raise :class:`InputError` if ``broken``; a symbolic condition waits for the run, where it is a bool."""
    if isinstance(broken, bool) and broken:
        raise InputError(sentence)


def check_pair(op: str, metric: Tensor, size: Tensor) -> None:
    """``metric`` must be [B, N, D] and ``size`` [B, N] of the same batch and tokens."""
    refuse(
        metric.ndim != 3 or size.ndim != 2,
        f"tokopt::{op}: metric must be [batch, tokens, channels] and size [batch, tokens], "
        f"got {metric.ndim} and {size.ndim} dimensions.",
    )
    for axis, name in enumerate(("batch", "tokens")):
        refuse(
            metric.shape[axis] != size.shape[axis],
            f"tokopt::{op}: metric has {name}={metric.shape[axis]} and size has {name}={size.shape[axis]}; "
            f"pass both for the same tokens.",
        )


def check_removal(op: str, tokens: int, r: int, prefix: int, limit: int, at_least: int = 0) -> None:
    """``0 <= prefix``, ``prefix + at_least <= tokens`` and ``0 <= r <= limit``."""
    refuse(prefix < 0, f"tokopt::{op}: prefix={prefix} is negative; count the leading protected tokens.")
    refuse(
        prefix + at_least > tokens,
        f"tokopt::{op}: {tokens} tokens leave fewer than {at_least} beside the prefix of {prefix}; "
        f"use a smaller prefix or more tokens.",
    )
    refuse(r < 0, f"tokopt::{op}: r={r} is negative; give the number of tokens to remove.")
    refuse(
        r > limit,
        f"tokopt::{op}: r={r} is more than the {limit} tokens that can be removed "
        f"from {tokens} with a prefix of {prefix}; use a smaller r.",
    )


def check_match(op: str, metric: Tensor, size: Tensor, r: int, prefix: int) -> None:
    """What every matching of tokens takes: a pair of tensors, and a removal of at most half of the free tokens."""
    check_pair(op, metric, size)
    tokens = size.shape[1]
    check_removal(op, tokens, r, prefix, limit=(tokens - prefix) // 2, at_least=2)


def empty_match(size: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of a matching without their values: ``keep`` [batch, tokens - r], ``drop`` and ``dest`` [batch, r]."""
    batch, tokens = size.shape
    keep = size.new_empty((batch, tokens - r), dtype=torch.int64)
    drop = size.new_empty((batch, r), dtype=torch.int64)
    return keep, drop, torch.empty_like(drop)


def unit(x: Tensor) -> Tensor:
    """``x`` [..., D] in float32 with every row scaled to length 1; zero rows stay zero."""
    x = x.float()
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(TINY)


def energies(vector: Tensor, real: Tensor, margin: float) -> Tensor:
    """PiToMe's energies [B, N] of unit vectors [B, N, D]: ``mean_j ELU(cos_ij - margin)`` over the ``real`` ones.

    Those that are not real get +inf.
    """
    weight = real / real.sum(dim=-1, keepdim=True).clamp_min(1)
    energy = (elu(vector @ vector.mT - margin) @ weight[:, :, None])[:, :, 0]
    return energy.masked_fill(~real, torch.inf)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows ``index`` [B, K] of ``x`` [B, N, ...]: [B, K, ...]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def leading(like: Tensor, count: int) -> Tensor:
    """0 .. count-1 for every row of ``like`` [B, ...]: int64 [B, count]."""
    return torch.arange(count, device=like.device).expand(like.shape[0], count)


def ranked(score: Tensor) -> Tensor:
    """Indices of ``score`` [B, N] from best to worst, ties by lowest index."""
    return score.sort(dim=-1, descending=True, stable=True).indices
