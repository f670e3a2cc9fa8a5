"""EViT: keep what the class token attends to (Liang et al., arXiv 2202.07800)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from tokopt.errors import PassError
from tokopt.kernels import ops
from tokopt.passes.reduce.base import Assignment, Size, TokenReduction, Tokens, nearest


@dataclass(frozen=True)
class EViT(TokenReduction):
    """Keep the tokens with the highest attention from the class token, averaged over heads.

    The score of token j is ``mean_heads softmax(q_cls . k / sqrt(d))_j``. With ``fuse`` the removed tokens become
    one more token, their attention-weighted sum (not normalised), and stand for it in per-token outputs; without
    it they are dropped. As published, ``keep`` counts the tokens that stay beside the fused one, which later blocks
    count as any other; ``r`` and ``target`` count the tokens by which the stream gets shorter. The paper keeps 0.7 in
    blocks 3, 6 and 9: ``evit{keep=0.7 layers=[3,6,9]}``.
    """

    fuse: bool = True

    name: ClassVar[str] = "evit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.fuse, bool):
            raise PassError(f"evit: fuse={self.fuse!r} must be true or false")

    def kept(self, keep: Fraction, tokens: Size) -> Size:
        """The share, rounded up, and the fused token."""
        attentive = super().kept(keep, tokens)
        return min(attentive + 1, tokens) if self.fuse else attentive

    def objection(self, prefix: int, dynamic: bool) -> str | None:
        """A class token is needed, and a fixed number of tokens for the fused one."""
        if prefix == 0:
            return "evit scores tokens by the attention of a class token, and this model protects none; set prefix=1"
        if self.fuse and dynamic:
            return "the fused token needs a fixed number of tokens; use fuse=false"
        return None

    def reduce(self, tokens: Tokens, r: Size, prefix: int) -> Assignment:
        """Select by class attention; ``r`` counts the tokens by which the stream gets shorter."""
        score = class_attention(tokens)
        if not self.fuse:
            keep, drop = ops.top_tokens(score, r, prefix)
            dest = nearest(tokens, keep, drop, prefix)
            stream = ops.gather_tokens(tokens.stream, keep, 1)
            return Assignment(keep, drop, dest, stream, ops.gather_tokens(tokens.size, keep, 1))
        return _fused(tokens, score, r, prefix)


def class_attention(tokens: Tokens) -> torch.Tensor:
    """[batch, tokens] attention from the first token, averaged over heads; padding gets -inf."""
    heads = tokens.query.shape[1] // tokens.key.shape[1]
    key = tokens.key.repeat_interleave(heads, 1) if heads > 1 else tokens.key
    logits = (tokens.query[:, :, :1] @ key.transpose(-1, -2)).float() * tokens.scale
    if tokens.bias is not None:
        logits = logits + tokens.bias
    score = logits.softmax(-1).mean(1).squeeze(1)
    return score.masked_fill(tokens.size == 0, float("-inf")) if tokens.padded else score


def _fused(tokens: Tokens, score: torch.Tensor, r: Size, prefix: int) -> Assignment:
    """``r + 1`` tokens leave and one returns, in the slot (and position) of the best of them."""
    keep, drop = ops.top_tokens(score, r + 1, prefix)
    weight = score.gather(1, drop).clamp_min(0).to(tokens.stream.dtype)
    fused = weight[:, None] @ ops.gather_tokens(tokens.stream, drop, 1)
    stream = torch.cat([ops.gather_tokens(tokens.stream, keep, 1), fused], 1)
    keep, rest = torch.cat([keep, drop[:, :1]], 1), drop[:, 1:]
    dest = torch.full_like(rest, 0) + (keep.shape[1] - 1)
    return Assignment(keep, rest, dest, stream, ops.gather_tokens(tokens.size, keep, 1))
