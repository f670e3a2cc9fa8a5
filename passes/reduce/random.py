"""Random pruning: the baseline that every other method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokopt.kernels import ops
from tokopt.passes.reduce.base import Assignment, Size, TokenReduction, Tokens, pruned


@dataclass(frozen=True)
class RandomPrune(TokenReduction):
    """Drop tokens at random slots, the same for every input: fixed by ``seed`` and the block's token count.

    The choice is computed from the slot numbers alone, so the exported program is deterministic and needs no
    source of randomness.
    """

    seed: int = 0

    name: ClassVar[str] = "random"

    def reduce(self, tokens: Tokens, r: Size, prefix: int) -> Assignment:
        """Keep the slots with the highest hash."""
        score = (
            slot_hash(tokens.size.shape[1], self.seed, tokens.size.device).expand_as(tokens.size).contiguous()
        )
        if tokens.padded:
            score = score.masked_fill(tokens.size == 0, float("-inf"))
        keep, drop = ops.top_tokens(score, r, prefix)
        return pruned(tokens, keep, drop, prefix)


_PRIME = 1_048_573  # the largest prime below 2**20: every hash is exact in float32


def slot_hash(tokens: Size, seed: int, device: torch.device) -> torch.Tensor:
    """[tokens] float32 pseudo-random whole numbers, in integer arithmetic so that every backend agrees."""
    value = torch.arange(tokens, device=device) + (1009 * seed + 1)
    for multiplier in (48_271, 69_621, 16_807):
        value = (value * multiplier) % _PRIME
        value = (value * value + 12_345) % _PRIME
    return value.float()
