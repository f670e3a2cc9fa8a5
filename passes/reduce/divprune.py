"""DivPrune: keep the most diverse tokens (Alvar et al., arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from tokopt.kernels import ops
from tokopt.passes.reduce.base import Assignment, Size, TokenReduction, Tokens, pruned


@dataclass(frozen=True)
class DivPrune(TokenReduction):
    """Keep a subset of tokens whose smallest pairwise distance is large (max-min diversity).

    Distance is 1 - cosine of the residual stream. The first pick is the token whose nearest other token is
    farthest; then, again and again, the token farthest from those picked. ``keep`` is rounded to the nearest count, as
    published: a half to the even one, and down where the number of tokens is dynamic. The paper prunes once, before a
    language model, and keeps 0.098 of the visual tokens: ``divprune{keep=0.098 layers=[0]}``.
    """

    name: ClassVar[str] = "divprune"

    def kept(self, keep: Fraction, tokens: Size) -> Size:
        """The share, rounded to nearest."""
        if isinstance(tokens, int):
            return round(keep * tokens)
        return (2 * tokens * keep.numerator + keep.denominator - 1) // (2 * keep.denominator)

    def reduce(self, tokens: Tokens, r: Size, prefix: int) -> Assignment:
        """Farthest-point selection by cosine distance."""
        keep, drop = ops.farthest_point(tokens.stream, tokens.size, r, prefix, "divprune")
        return pruned(tokens, keep, drop, prefix)
