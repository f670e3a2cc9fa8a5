"""How often a draft is accepted, by its depth and its rank among its siblings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokopt.arguments import check_number
from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Floats
from tokopt.runtime.speculation.tree import Ints, Tree


@dataclass(frozen=True, eq=False)
class Acceptance:
    """Counts [depth, rank] of children that stood below an accepted node, and of those that were accepted.

    Depth 0 is the root's children. What is deeper or of a higher rank than the counts is left out. ``prior`` [depth,
    rank] is the share accepted that is assumed before anything was seen; it counts as ``weight`` children.
    """

    prior: Floats
    weight: float
    offered: Floats
    accepted: Floats

    @classmethod
    def assume(cls, prior: Floats, weight: float = 8.0) -> Acceptance:
        """Nothing was seen yet."""
        prior = np.asarray(prior, np.float64)
        if prior.ndim != 2 or not prior.size or not ((prior >= 0) & (prior <= 1)).all():
            raise InputError("prior must be an array [depth, rank] of shares from 0 to 1")
        weight = check_number("weight", weight, lambda x: x > 0, "above 0")
        return cls(prior, weight, np.zeros_like(prior), np.zeros_like(prior))

    def observe(self, tree: Tree, path: Ints) -> Acceptance:
        """The counts after one more tree, of which the nodes of ``path`` [n] were accepted, from the root down."""
        offered, accepted = self.offered.copy(), self.accepted.copy()
        depths, ranks = offered.shape
        nodes = [int(node) for node in path]
        for depth, node in enumerate(nodes[:depths]):
            offered[depth, : min(len(tree.children[node]), ranks)] += 1
            if depth + 1 < len(nodes) and (rank := int(tree.rank[nodes[depth + 1]])) < ranks:
                accepted[depth, rank] += 1
        return Acceptance(self.prior, self.weight, offered, accepted)

    @property
    def shares(self) -> Floats:
        """The estimate [depth, rank]: of how many children there is the one accepted, given that the parent is."""
        return (self.accepted + self.weight * self.prior) / (self.offered + self.weight)
