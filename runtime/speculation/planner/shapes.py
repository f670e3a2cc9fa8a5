"""Which tree a drafter fills: by how often drafts of a depth and rank were accepted."""

from __future__ import annotations

import numpy as np

from tokopt.arguments import check_integer
from tokopt.runtime.speculation.acceptance import Acceptance
from tokopt.runtime.speculation.decisions import Floats
from tokopt.runtime.speculation.planner.sequoia import Sequoia
from tokopt.runtime.speculation.tree import Ints, Tree

DEPTHS = 8
"""Levels of a tree below its root."""

RATES = (0.45, 0.13, 0.07, 0.05, 0.03, 0.02, 0.02, 0.01)
"""How often children of each rank are accepted, before anything was seen."""

AGAIN = 64
"""Trees after which the shape is planned anew."""


class Shapes:
    """The trees of one model and drafter, from one text to the next; the first n nodes are the best tree of n nodes.

    A ``chain`` is for drafters that build trees of their own, of which the number of nodes counts alone, and for rules
    that take one child.
    """

    def __init__(self, most: int, ranks: int, *, chain: bool) -> None:
        """At most ``most`` nodes, and ``ranks`` children of a node."""
        self.most, self.chain = check_integer("most", most, 1), chain
        rates = np.array(RATES[: max(1, min(ranks, len(RATES)))])
        self.acceptance = Acceptance.assume(np.tile(rates, (DEPTHS, 1)))
        self._seen, self._parent = 0, self._planned()

    @property
    def parents(self) -> tuple[int, ...]:
        """Of every node of the largest tree the one before it, -1 for the root."""
        return tuple(self._parent.tolist())

    def tree(self, nodes: int) -> Tree:
        """The tree of so many nodes, or of all where there are fewer."""
        return Tree(self._parent[:nodes])

    def observe(self, tree: Tree, path: Ints) -> None:
        """Take note of a verified tree, of which the nodes of ``path`` were accepted."""
        if self.chain:
            return
        self.acceptance, self._seen = self.acceptance.observe(tree, path), self._seen + 1
        if self._seen % AGAIN == 0:
            self._parent = self._planned()

    def _planned(self) -> Ints:
        if self.chain:
            return Tree.chain(self.most).parent
        # Of siblings the first is the likeliest, so that the likeliest nodes are a tree.
        shares = np.minimum.accumulate(self.acceptance.shares, axis=1)
        depths, ranks = shares.shape
        largest = sum(ranks**depth for depth in range(depths + 1))
        return likeliest_first(Sequoia(shares, min(self.most, largest)).tree(min(self.most, largest)), shares)


def likeliest_first(tree: Tree, shares: Floats) -> Ints:
    """The parents of a tree whose nodes stand in the order of the probability that they are accepted."""
    reached = np.ones(tree.nodes)
    for node in range(1, tree.nodes):
        parent = int(tree.parent[node])
        reached[node] = reached[parent] * shares[tree.depth[parent], tree.rank[node]]
    order = np.argsort(-reached, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(tree.nodes)
    parents = place[tree.parent[order]]
    parents[0] = -1
    return parents
