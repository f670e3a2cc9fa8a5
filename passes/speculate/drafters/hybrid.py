"""Prompt lookup where the text repeats itself, Token Recycling elsewhere and beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokopt.ir.format import Generation, State
from tokopt.passes.speculate.drafters import Verified
from tokopt.passes.speculate.drafters.prompt_lookup import PromptLookup, following
from tokopt.passes.speculate.drafters.token_recycling import LEVELS, WIDTH, TokenRecycling
from tokopt.passes.speculate.tree import Tree

SURE = 2
"""Tokens of the text's end that have to occur before."""


@dataclass(frozen=True)
class Hybrid:
    """Nodes that are a first child of a first child, and so on, follow the text's earlier occurrence if there is one.

    All others, and all without such an occurrence, get the followers that Token Recycling keeps of their parent.
    """

    rates: list[float] = field(default_factory=lambda: [0.55, 0.1, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01])
    below: list[float] | None = None
    fade: float = 1.0
    text: PromptLookup = field(default_factory=PromptLookup)
    table: TokenRecycling = field(default_factory=TokenRecycling)

    def states(self, generation: Generation) -> Sequence[State]:
        """Those of both."""
        return (*self.text.states(generation), *self.table.states(generation))

    def read(self, tokens: Tensor, positions: Tensor, logits: Tensor, *memory: Tensor) -> Sequence[Tensor]:
        """The text is read."""
        return self.text.read(tokens, positions, logits, *memory[:-1])

    def confidence(self, root: Tensor, *memory: Tensor) -> Tensor:
        """One more than the tokens that agree, where they are enough; else that of Token Recycling."""
        agreed = self.text.confidence(root, *memory[:-1])
        return torch.where(agreed >= SURE, agreed + 1, self.table.confidence(root, memory[-1]))

    def propose(self, root: Tensor, position: Tensor, shape: Tree, *memory: Tensor) -> Tensor:
        """Level by level, since what follows a token of the text may be recycled."""
        *text, table = memory
        first = (shape.sees & (shape.rank > 0)[None, :]).sum(1) == 0
        copied = (self.text.confidence(root, *text) >= SURE)[:, None] & first[None]
        token = following(position, shape, *text)
        rank = shape.rank.clamp_max(WIDTH - 1)
        tokens = root[:, None].expand(-1, shape.index.shape[0])
        for _ in range(LEVELS):
            follower = table[tokens[:, shape.up], rank[None]].long()
            proposed = torch.where(copied & (token >= 0), token, follower)
            tokens = torch.where(shape.index == 0, tokens, proposed)
        return tokens

    def observe(self, verified: Verified, *memory: Tensor) -> Sequence[Tensor]:
        """Both observe."""
        return [*self.text.observe(verified, *memory[:-1]), *self.table.observe(verified, memory[-1])]


DRAFTER = Hybrid()
