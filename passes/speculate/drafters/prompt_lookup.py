"""Prompt lookup (n-gram) decoding: what followed the same words earlier in the text may follow them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokopt.ir.format import BATCH, Generation, State
from tokopt.passes.speculate.tree import Tree

WORDS = 3
"""Tokens that are looked for at most."""


@dataclass(frozen=True)
class PromptLookup:
    """The text so far by position; the tokens after the longest and newest earlier occurrence of its end.

    Of the last three tokens, two or one, as many as possible have to be the same. A node of rank 0 at depth d gets the
    d-th token after that occurrence; its siblings get none.
    """

    rates: list[float] = field(default_factory=lambda: [0.7])
    fade: float = 1.0

    def states(self, generation: Generation) -> Sequence[State]:
        """The token at every position, -1 where there is none yet; one place more takes what is no token."""
        return (State("text", "history", "int32", (BATCH, generation.context + 1), -1),)

    def read(self, tokens: Tensor, positions: Tensor, *memory: Tensor) -> Sequence[Tensor]:
        """Write the prompt."""
        return [written(memory[0], tokens, positions)]

    def propose(self, root: Tensor, position: Tensor, shape: Tree, *memory: Tensor) -> Tensor:
        """The tokens after the occurrence; -1 stands for none and becomes token 0."""
        text = written(memory[0], root[:, None], position[:, None])
        found, _ = occurrence(text, position)
        place = (found[:, None] + shape.depth).clamp(0, text.shape[1] - 1)
        token = text.gather(1, place).long().clamp_min(0)
        return torch.where(shape.index == 0, root[:, None], token)

    def observe(
        self, tokens: Tensor, logits: Tensor, committed: Tensor, places: Tensor, *memory: Tensor
    ) -> Sequence[Tensor]:
        """Write the root, in front of what was committed, and that."""
        tokens, places = torch.cat([tokens[:, :1], committed], 1), torch.cat([places[:, :1] - 1, places], 1)
        return [written(memory[0], tokens, places)]


def written(text: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
    """The text [batch, context + 1] with tokens [batch, n] at their positions; those of -1 go to the last place.

    What lies beyond the context goes there, too; that place is never read as text.
    """
    last = text.shape[1] - 1
    index = torch.where((places >= 0) & (places < last), places, last)
    value = torch.where(index < last, tokens, -1).to(text.dtype)
    return text.scatter(1, index, value)


def occurrence(text: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Where the text's end at ``position`` [batch] occurred before, and how many of its tokens agree [batch].

    Without an occurrence that is the last place of the text, and 0.
    """
    size = text.shape[1] - 1
    place = torch.arange(size)
    length = torch.zeros_like(text[:, :size], dtype=torch.int64)
    agree = torch.ones_like(text[:, :size], dtype=torch.bool)
    for back in range(WORDS):
        here = text.gather(1, (position - back).clamp_min(0)[:, None])[:, 0]
        there = text[:, :size].roll(back, 1) if back else text[:, :size]
        known = (place >= back) & (position[:, None] >= back)
        agree = agree & known & (there == here[:, None])
        length = length + agree
    before = place < position[:, None]
    score = torch.where(before & (length > 0), length * size + place, -1)
    best, found = score.max(-1)
    return torch.where(best >= 0, found, size), torch.where(best >= 0, best // size, 0)


DRAFTER = PromptLookup()
