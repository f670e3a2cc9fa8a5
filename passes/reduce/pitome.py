"""PiToMe: merging that protects informative tokens (Tran et al., arXiv 2405.16148)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tokopt.errors import PassError
from tokopt.kernels import ops
from tokopt.passes.reduce.base import Assignment, Size, TokenMerging, Tokens


@dataclass(frozen=True)
class PiToMe(TokenMerging):
    """Merge tokens of large clusters first, by their energy.

    ``E_i = mean_j ELU(cos(k_i, k_j) - m)`` is high for tokens with many look-alikes. Tokens are ranked by it, and two
    matchings follow the ranks. ``bipartite``: even ranks form A, odd ones B, every A finds its most similar B, and the
    ``r`` best pairs of all merge. ``algorithm1``, the paper's: the ``2r`` tokens of highest energy alternate into A and
    B and every A merges into its most similar B; the others are protected. The authors' code for ViTs has the first in
    one half of the blocks: ``deit``, the default, in the first half (the larger, if unequal), ``mae`` in the last.

    The margin falls with depth, ``m_l = margin * (1 - l / blocks)``: 0.75 suits DeiT and MAE, 0.9 CLIP (the paper's
    values). The paper's ratio of 0.9125 is ``pitome{keep=0.9125}``; its code for classification is without proportional
    attention, ``proportional=false``.
    """

    margin: float = 0.75
    matching: Literal["deit", "mae", "bipartite", "algorithm1"] = "deit"

    name: ClassVar[str] = "pitome"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.margin <= 1:
            raise PassError(f"pitome: margin={self.margin} is compared with a cosine; use a value in [-1, 1]")
        if self.matching not in ("deit", "mae", "bipartite", "algorithm1"):
            raise PassError(f"pitome: matching={self.matching!r} must be deit, mae, bipartite or algorithm1")

    def bipartite(self, depth: float) -> bool:
        """Whether the block at this depth (0 to below 1) merges the best pairs of all tokens."""
        if self.matching in ("deit", "mae"):
            return (depth < 0.5) == (self.matching == "deit")
        return self.matching == "bipartite"

    def reduce(self, tokens: Tokens, r: Size, prefix: int) -> Assignment:
        """Match by energy and merge."""
        margin = self.margin * (1 - tokens.depth)
        match = ops.energy_bipartite_match if self.bipartite(tokens.depth) else ops.energy_match
        keep, drop, dest = match(tokens.key.mean(1), tokens.size, r, prefix, margin)
        stream, size = ops.merge_tokens(tokens.stream, tokens.size, keep, drop, dest)
        return Assignment(keep, drop, dest, stream, size)
