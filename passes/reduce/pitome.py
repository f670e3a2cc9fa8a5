"""PiToMe: merging that protects informative tokens (Tran et al., arXiv 2405.16148)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokopt.errors import PassError
from tokopt.kernels import ops
from tokopt.passes.reduce.base import Assignment, Size, TokenReduction, Tokens


@dataclass(frozen=True)
class PiToMe(TokenReduction):
    """Merge tokens of large clusters first, by their energy.

    ``E_i = mean_j ELU(cos(k_i, k_j) - m)`` is high for tokens with many look-alikes. The ``2r`` tokens of highest
    energy alternate into A and B and every A merges into its most similar B; the others are protected. The margin
    falls with depth, ``m_l = margin * (1 - l / blocks)``: 0.75 suits DeiT and MAE, 0.9 CLIP (the paper's values).
    Unlike the published code, sizes weigh later attentions (``log(size)``), as in ToMe.
    """

    margin: float = 0.75

    name: ClassVar[str] = "pitome"
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.margin <= 1:
            raise PassError(f"pitome: margin={self.margin} is compared with a cosine; use a value in [-1, 1]")

    def most(self, tokens: Size, prefix: int, padded: bool) -> Size:
        """Half of the unprotected tokens."""
        return (tokens - prefix - padded) // 2

    def reduce(self, tokens: Tokens, r: Size, prefix: int) -> Assignment:
        """Match by energy and merge."""
        margin = self.margin * (1 - tokens.depth)
        keep, drop, dest = ops.energy_match(tokens.key.mean(1), tokens.size, r, prefix, margin)
        stream, size = ops.merge_tokens(tokens.stream, tokens.size, keep, drop, dest)
        return Assignment(keep, drop, dest, stream, size)
