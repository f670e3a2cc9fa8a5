"""The tree that gives the most tokens per call, from the acceptance by depth and rank (arXiv 2402.12374)."""

from __future__ import annotations

import numpy as np

from tokopt.arguments import check_integer
from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Floats
from tokopt.runtime.speculation.tree import Tree


def expected_tokens(tree: Tree, shares: Floats) -> float:
    """Tokens that a call with this tree commits on average: the sum over nodes of the probability to be accepted.

    ``shares`` [depth, rank] is the probability that the child of that rank is the one accepted, given that its parent
    was; 0 outside of the array.
    """
    reached = np.ones(tree.nodes)
    for node in range(1, tree.nodes):
        parent, rank = int(tree.parent[node]), int(tree.rank[node])
        inside = tree.depth[parent] < shares.shape[0] and rank < shares.shape[1]
        reached[node] = reached[parent] * (shares[tree.depth[parent], rank] if inside else 0)
    return float(reached.sum())


class Sequoia:
    """The best tree of every number of nodes up to ``most``, by dynamic programming.

    ``below[depth, nodes]`` is the most that a subtree of so many nodes gives whose root is that deep and accepted;
    ``rows[depth, rank, nodes]`` the most that siblings from that rank on give together. A tree is no deeper and no
    wider than ``shares`` [depth, rank]: a number of nodes for which there is none has expectation -inf.
    """

    def __init__(self, shares: Floats, most: int) -> None:
        self.shares = np.asarray(shares, np.float64)
        if self.shares.ndim != 2 or not ((self.shares >= 0) & (self.shares <= 1)).all():
            raise InputError("shares must be an array [depth, rank] of probabilities")
        self.most = check_integer("most", most, 1)
        depths, ranks = self.shares.shape
        self._below = np.full((depths + 1, self.most + 1), -np.inf)
        self._below[depths, 1] = 1
        self._rows = np.full((depths, ranks + 1, self.most + 1), -np.inf)
        self._first = np.zeros((depths, ranks, self.most + 1), np.int64)
        for depth in reversed(range(depths)):
            self._fill(depth)

    @property
    def expected(self) -> Floats:
        """Tokens per call of the best tree by its number of nodes [most + 1]; -inf for 0 nodes."""
        return self._below[0]

    def tree(self, nodes: int) -> Tree:
        """The best tree of so many nodes, with parents before children, level by level."""
        nodes = check_integer("nodes", nodes, 1, self.most)
        if not np.isfinite(self.expected[nodes]):
            depths, ranks = self.shares.shape
            raise InputError(
                f"no tree of depth {depths} and {ranks} children has {nodes} nodes; ask for fewer"
            )
        parent, level, depth = [-1], [(0, nodes)], 0
        while level:
            following: list[tuple[int, int]] = []
            for node, size in level:
                for child_size in self._sizes(depth, size):
                    following.append((len(parent), child_size))
                    parent.append(node)
            level, depth = following, depth + 1
        return Tree(np.array(parent))

    def _fill(self, depth: int) -> None:
        """The rows of one depth from the subtrees below it, the last rank first."""
        rows, child = self._rows[depth], self._below[depth + 1]
        rows[:, 0] = 0
        for rank in reversed(range(self.shares.shape[1])):
            possible = np.isfinite(child)
            gain = np.where(possible, self.shares[depth, rank] * np.where(possible, child, 0), -np.inf)
            for nodes in range(1, self.most + 1):
                split = gain[1 : nodes + 1] + rows[rank + 1, nodes - 1 :: -1]
                size = int(split.argmax())
                rows[rank, nodes], self._first[depth, rank, nodes] = split[size], size + 1
        self._below[depth, 1:] = 1 + rows[0, :-1]

    def _sizes(self, depth: int, size: int) -> list[int]:
        """The sizes of the subtrees below a node whose own subtree has ``size`` nodes."""
        left, found = size - 1, list[int]()
        while left:
            found.append(int(self._first[depth, len(found), left]))
            left -= found[-1]
        return found
