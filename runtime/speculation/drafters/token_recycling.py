"""Token Recycling: what was likely after a token the last time it was verified."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokopt.arguments import LARGEST, check_integer
from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Decisions
from tokopt.runtime.speculation.draft import Draft, Drawn
from tokopt.runtime.speculation.drafters.base import Verified, read_prompt
from tokopt.runtime.speculation.tree import Tree

UNSEEN = -1
"""In the table: nothing was verified after this token."""


class TokenRecycling:
    """A table [vocabulary, width] int32 of the likeliest ids after each token (arXiv 2408.08696).

    All texts share it, and it outlives them. With 8 ids for each of 49,152 tokens it takes 1,572,864 bytes. The node of
    a plan with rank r gets column r of its parent's row; where nothing was verified yet, it is left out with what is
    below it (published code drafts token 0).
    """

    name = "token_recycling"
    drawn = Drawn.DETERMINISTIC
    fills = True

    def __init__(self, vocabulary: int, width: int = 8) -> None:
        vocabulary = check_integer("vocabulary", vocabulary, 1, LARGEST)
        width = check_integer("width", width, 1, vocabulary)
        self.table = np.full((vocabulary, width), UNSEEN, np.int32)

    @property
    def tops(self) -> int:
        """The table's width."""
        return self.table.shape[1]

    def open(self, prompt: Sequence[int]) -> TokenRecyclingText:
        """Start with a text, whose tokens the table must have rows for."""
        ids = read_prompt(prompt)
        if max(ids) >= len(self.table):
            raise InputError(f"the prompt has token {max(ids)}, the table is for {len(self.table)} tokens")
        return TokenRecyclingText(self, ids[-1])

    def propose(self, plan: Tree, root: int) -> Draft:
        """The plan's nodes with tokens from the table."""
        if plan.nodes > 1 and int(plan.rank.max()) >= self.tops:
            raise InputError(
                f"the plan has {int(plan.rank.max()) + 1} children at a node, the table {self.tops} ids per token"
            )
        tokens = np.full(plan.nodes, root, np.int64)
        for node in range(1, plan.nodes):
            before = tokens[plan.parent[node]]
            tokens[node] = self.table[before, plan.rank[node]] if before != UNSEEN else UNSEEN
        tree, kept = plan.keep(tokens != UNSEEN)
        return Draft(tree, tokens[kept], self.drawn)

    def write(self, verified: Verified) -> None:
        """Store what is likely after every node, accepted or not, node after node: the last one of a token stays."""
        vocabulary, width = self.table.shape
        for node, token in enumerate(verified.draft.tokens.tolist()):
            ids = verified.top_of(node, width)
            if len(ids) != width or not 0 <= min(ids) <= max(ids) < vocabulary:
                raise InputError(
                    f"top has {ids} after node {node}, the table takes {width} ids below {vocabulary}"
                )
            self.table[token] = ids


class TokenRecyclingText:
    """One text's last token, and the table that it shares."""

    def __init__(self, shared: TokenRecycling, root: int) -> None:
        self.shared, self.root = shared, root

    def propose(self, plan: Tree, decisions: Decisions) -> Draft:
        """The plan's nodes with tokens from the table."""
        return self.shared.propose(plan, self.root)

    def observe(self, verified: Verified) -> None:
        """Write to the table, after the tree was verified and a path accepted."""
        self.shared.write(verified)
        self.root = int(verified.accepted.tokens[-1])
