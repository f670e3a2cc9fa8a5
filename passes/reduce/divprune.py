"""DivPrune: keep the most diverse tokens (Alvar et al., arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokopt.kernels import ops
from tokopt.passes.reduce.base import Assignment, Size, TokenReduction, Tokens, pruned


@dataclass(frozen=True)
class DivPrune(TokenReduction):
    """Keep a subset of tokens whose smallest pairwise distance is large (max-min diversity).

    Distance is 1 - cosine of the residual stream. The first pick is the token whose nearest other token is
    farthest; then, again and again, the token farthest from those picked. The paper prunes once, before a language
    model, and keeps 0.098 of the visual tokens: ``divprune{keep=0.098 layers=[0]}``.
    """

    name: ClassVar[str] = "divprune"

    def reduce(self, tokens: Tokens, r: Size, prefix: int) -> Assignment:
        """Farthest-point selection by cosine distance."""
        keep, drop = ops.farthest_point(tokens.stream, tokens.size, r, prefix, "divprune")
        return pruned(tokens, keep, drop, prefix)
