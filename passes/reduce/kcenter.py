"""Greedy k-center selection, stage 1 of ToDRE (arXiv 2505.18757, version 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokopt.kernels import ops
from tokopt.passes.reduce.base import Assignment, Size, TokenReduction, Tokens, pruned


@dataclass(frozen=True)
class KCenter(TokenReduction):
    """Keep tokens such that every removed one is close to a kept one (greedy k-center, a 2-approximation).

    Distance is Euclidean on the residual stream; the first centre is the token nearest the mean. ToDRE's version 2
    replaces this by max-sum diversification; this is version 1, which keeps about 0.1 of the tokens.
    """

    name: ClassVar[str] = "kcenter"

    def reduce(self, tokens: Tokens, r: Size, prefix: int) -> Assignment:
        """Farthest-point selection by Euclidean distance."""
        keep, drop = ops.farthest_point(tokens.stream, tokens.size, r, prefix, "kcenter")
        return pruned(tokens, keep, drop, prefix)
