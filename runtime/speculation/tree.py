"""Draft trees: which node follows which, and who sees whom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tokopt.arguments import check_integer
from tokopt.errors import InputError

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Tree:
    """Nodes that one call of a model verifies, each after its parent.

    Node 0 is the root: the last token of the text, whose cache entry is not written yet. ``parent`` [nodes] int64 is
    -1 for it; every other parent has a smaller index than its child. Raises InputError for any other array.
    """

    parent: Ints

    def __post_init__(self) -> None:
        given = np.asarray(self.parent)
        if given.ndim != 1 or not given.size or given.dtype.kind not in "iu":
            raise InputError(
                f"parent has shape {given.shape} and dtype {given.dtype}, it must be integers [nodes]"
            )
        parent = given.astype(np.int64)
        if parent[0] != -1:
            raise InputError(f"the parent of node 0 is {parent[0]}, it must be -1, since node 0 is the root")
        wrong = np.flatnonzero((parent[1:] < 0) | (parent[1:] >= np.arange(1, len(parent)))) + 1
        if wrong.size:
            node = int(wrong[0])
            raise InputError(
                f"the parent of node {node} is {parent[node]}, it must be a node before it; sort parents first"
            )
        parent.flags.writeable = False
        object.__setattr__(self, "parent", parent)

    @classmethod
    def chain(cls, nodes: int) -> Tree:
        """Every node the only child of the one before; 1 node is the root alone."""
        return cls(np.arange(-1, check_integer("nodes", nodes, 1) - 1))

    @property
    def nodes(self) -> int:
        """Number of nodes, the root included."""
        return len(self.parent)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The children of every node, in the order of their indices."""
        found: list[list[int]] = [[] for _ in range(self.nodes)]
        for node in range(1, self.nodes):
            found[int(self.parent[node])].append(node)
        return tuple(map(tuple, found))

    @cached_property
    def depth(self) -> Ints:
        """Edges from the root [nodes]; a node's position is the root's plus this."""
        found = np.zeros(self.nodes, np.int64)
        for node in range(1, self.nodes):
            found[node] = found[self.parent[node]] + 1
        return found

    @cached_property
    def rank(self) -> Ints:
        """Place among the siblings [nodes], from 0; 0 for the root."""
        found = np.zeros(self.nodes, np.int64)
        for siblings in self.children:
            found[list(siblings)] = range(len(siblings))
        return found

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Whether a node (first axis) sees another (second): itself and its ancestors."""
        found = np.zeros((self.nodes, self.nodes), np.bool_)
        for node in range(self.nodes):
            found[node, list(self.path(node))] = True
        return found

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """The nodes from the root to every leaf, in the order of the leaves."""
        return tuple(self.path(node) for node, below in enumerate(self.children) if not below)

    def path(self, node: int) -> tuple[int, ...]:
        """The nodes from the root to ``node``."""
        found = [node]
        while found[-1]:
            found.append(int(self.parent[found[-1]]))
        return tuple(reversed(found))

    def keep(self, kept: NDArray[np.bool_]) -> tuple[Tree, Ints]:
        """The tree of the nodes where ``kept`` [nodes] and whose ancestors are all kept, and their old indices.

        The root always is.
        """
        whole = np.array(kept, np.bool_)
        whole[0] = True
        for node in range(1, self.nodes):
            whole[node] &= whole[self.parent[node]]
        new = np.cumsum(whole) - 1
        parent = new[self.parent[whole]]
        parent[0] = -1
        return Tree(parent), np.flatnonzero(whole)


class Branches:
    """A tree of tokens under construction: a token occurs once among siblings."""

    def __init__(self, root: int) -> None:
        self.tokens, self.parent = [root], [-1]
        self._known: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int) -> int:
        """The child of ``parent`` with this token, which is made where there is none."""
        node = self._known.setdefault((parent, token), len(self.tokens))
        if node == len(self.tokens):
            self.tokens.append(token)
            self.parent.append(parent)
        return node

    def extend(self, tokens: Iterable[int], nodes: int, parent: int = 0) -> list[int]:
        """Add a path of tokens below ``parent``, as far as the tree stays at ``nodes`` nodes; its nodes."""
        found: list[int] = []
        for token in tokens:
            if len(self.tokens) >= nodes and (parent, token) not in self._known:
                break
            parent = self.add(parent, token)
            found.append(parent)
        return found

    @property
    def tree(self) -> Tree:
        """The tree as it is now."""
        return Tree(np.array(self.parent))


def merge_duplicates(tree: Tree, tokens: Sequence[int] | Ints) -> tuple[Tree, Ints, Ints]:
    """One node for all nodes with the same tokens from the root: the tree, its tokens, and each old node's new index.

    The first of equal siblings keeps its place; the others' children follow its own. For drafts whose number of copies
    counts (drawn independently of each other), siblings must stay as they are.
    """
    ids = [int(token) for token in tokens]
    if len(ids) != tree.nodes:
        raise InputError(f"there are {len(ids)} tokens, the tree has {tree.nodes} nodes; give one per node")
    merged = Branches(ids[0])
    new = [0]
    for node in range(1, tree.nodes):
        new.append(merged.add(new[int(tree.parent[node])], ids[node]))
    return merged.tree, np.array(merged.tokens), np.array(new)
