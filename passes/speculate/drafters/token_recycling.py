"""Token Recycling (arXiv 2408.08696): what followed a token before, in the model's own view, may follow it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokopt.ir.format import Generation, State
from tokopt.kernels import ops
from tokopt.passes.speculate.drafters import Verified
from tokopt.passes.speculate.tree import Tree

WIDTH = 8
"""Followers that are kept of a token."""

LEVELS = 8
"""Levels of a tree that get tokens; a node below them repeats its grandparents' and is rarely right."""


@dataclass(frozen=True)
class TokenRecycling:
    """A table [vocabulary, 8] of the likeliest followers of every token, shared by all rows.

    A node of rank r gets the r-th follower of its parent's token. Every verified node, accepted or not, writes the
    eight largest logits after it into the row of its token; of several nodes with one token the last counts.
    """

    rates: list[float] = field(default_factory=lambda: [0.45, 0.13, 0.07, 0.05, 0.03, 0.02, 0.02, 0.01])
    below: list[float] | None = None
    fade: float = 1.0

    def states(self, generation: Generation) -> Sequence[State]:
        """The table, which begins with token 0 everywhere."""
        return (State("followers", "table", "int32", (generation.vocabulary, WIDTH)),)

    def read(self, tokens: Tensor, positions: Tensor, logits: Tensor, *memory: Tensor) -> Sequence[Tensor]:
        """What is read alone has no logits: nothing is learned of it."""
        return []

    def confidence(self, root: Tensor, *memory: Tensor) -> Tensor:
        """1 where followers of the token are known."""
        return (memory[0][root] != 0).any(1).long()

    def propose(self, root: Tensor, position: Tensor, shape: Tree, *memory: Tensor) -> Tensor:
        """Followers of followers."""
        (table,) = memory
        rank = shape.rank.clamp_max(WIDTH - 1)
        tokens = root[:, None].expand(-1, shape.index.shape[0])
        for _ in range(LEVELS):
            follower = table[tokens[:, shape.up], rank[None]].long()
            tokens = torch.where(shape.index == 0, tokens, follower)
        return tokens

    def observe(self, verified: Verified, *memory: Tensor) -> Sequence[Tensor]:
        """Write the likeliest followers of every node."""
        (table,) = memory
        found = ops.likeliest(verified.logits, WIDTH).flatten(0, 1).to(table.dtype)
        nodes = verified.tokens.flatten()
        index = torch.arange(nodes.shape[0])
        last = torch.where(nodes[:, None] == nodes[None, :], index[None, :], -1).amax(1)
        return [table.index_put((nodes,), found[last])]


DRAFTER = TokenRecycling()
