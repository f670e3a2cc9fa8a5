"""ToMe: bipartite soft matching (Bolya et al., arXiv 2210.09461)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokopt.kernels import ops
from tokopt.passes.reduce.base import Assignment, Size, TokenMerging, Tokens


@dataclass(frozen=True)
class ToMe(TokenMerging):
    """Merge the ``r`` most similar pairs of tokens in every block, between attention and MLP.

    Tokens alternate into sets A and B; every A finds its most similar B by the cosine of mean-over-heads keys;
    the ``r`` best pairs merge into the size-weighted mean. Proportional attention makes merging exact duplicates exact;
    ``proportional=false`` leaves it out, as in the paper's results for MAE. ``r=0`` changes nothing.

    Unmerged tokens of A stay in ascending order. The authors' code orders them by similarity where there is no class
    token, so later blocks then split into other sets than here.

    With a padding mask real tokens are ordered first, so that a real token always finds a real partner.
    """

    name: ClassVar[str] = "tome"

    def reduce(self, tokens: Tokens, r: Size, prefix: int) -> Assignment:
        """Match and merge."""
        metric, size = tokens.key.mean(1), tokens.size
        order = _real_first(size) if tokens.padded else None
        if order is not None:
            metric, size = ops.gather_tokens(metric, order, 1), ops.gather_tokens(size, order, 1)
        keep, drop, dest = ops.bipartite_match(metric, size, r, prefix)
        if order is not None:
            keep, drop = order.gather(1, keep), order.gather(1, drop)
        stream, size = ops.merge_tokens(tokens.stream, tokens.size, keep, drop, dest)
        return Assignment(keep, drop, dest, stream, size)


_LATER = 2**30  # more than any token count, and no more than 32 bits hold


def _real_first(size: torch.Tensor) -> torch.Tensor:
    """[batch, tokens] indices of real tokens in order, then of padding in order."""
    index = torch.arange(size.shape[1], device=size.device)
    return torch.where(size == 0, index + _LATER, index).argsort(dim=1)
