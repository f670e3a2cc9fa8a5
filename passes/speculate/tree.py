"""A tree of proposed tokens as tensors: who descends from whom, and which path the model's own tokens take.

Node 0 is the root, the last token that was committed; a parent comes before its children. A node sees its ancestors and
itself, and stands as many positions behind the root as it is deep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DOUBLINGS = 5
"""Ancestors are found by doubling the steps upwards: up to 2**5 = 32 levels."""


class Tree(NamedTuple):
    """``up`` [nodes] is the parent, of the root itself; ``sees`` [nodes, nodes] bool who descends from whom.

    ``depth`` [nodes] and ``rank`` [nodes], the number among its siblings, are int64, as ``index`` [nodes] is.
    """

    index: Tensor
    up: Tensor
    sees: Tensor
    depth: Tensor
    rank: Tensor


def tree(parent: Tensor) -> Tree:
    """The tree of ``parent`` [nodes] int64, -1 for the root."""
    index = torch.arange(parent.shape[0])
    up = parent.clamp_min(0)
    sees = (index[:, None] == index[None, :]) | (up[:, None] == index[None, :])
    for _ in range(DOUBLINGS):
        sees = sees.float() @ sees.float() > 0
    depth = sees.sum(1) - 1
    older = index[None, :] < index[:, None]
    rank = ((parent[:, None] == parent[None, :]) & older).sum(1)
    return Tree(index, up, sees, depth, rank)


def is_chain(parents: Sequence[int]) -> bool:
    """Whether each node of a tree follows the one before it."""
    return list(parents) == list(range(-1, len(parents) - 1))


def chain(parent: Tensor) -> Tree:
    """What :func:`tree` says of a chain, by the number of its nodes alone."""
    index = torch.arange(parent.shape[0])
    sees = index[None, :] <= index[:, None]
    return Tree(index, (index - 1).clamp_min(0), sees, index, torch.zeros_like(index))


def accepted_in_chain(tokens: Tensor, chosen: Tensor, limit: Tensor) -> Tensor:
    """The number of tokens [batch] that :func:`accepted` says of a chain, whose path is its first nodes."""
    index = torch.arange(tokens.shape[1])
    wrong = (tokens[:, 1:] != chosen[:, :-1]).int().cumsum(1) > 0
    right = (~wrong & (index[None, 1:] < limit[:, None])).sum(1)
    return torch.where(limit > 0, right + 1, 0)


def accepted(shape: Tree, tokens: Tensor, chosen: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """The path [batch, nodes] of the nodes that are right, and the number of tokens [batch] that it commits.

    ``tokens`` [batch, nodes] were proposed, and after node i the model itself chooses ``chosen[:, i]``. A node is right
    where it is what its parent's choice says, and all its ancestors are. Of the deepest the first is taken, not deeper
    than ``limit`` [batch] tokens allow: the path's nodes but the root, and the choice after the last. Behind the end
    the path has node 0; a row with a limit of 0 commits nothing.
    """
    fits = fitting(shape, tokens == chosen[:, shape.up], limit)
    best = torch.where(fits, shape.depth[None], -1).argmax(-1)
    return path_to(shape, best), torch.where(limit > 0, shape.depth[best] + 1, 0)


def fitting(shape: Tree, right: Tensor, limit: Tensor) -> Tensor:
    """Which nodes [batch, nodes] are ``right`` with all their ancestors, the root apart, and not deeper than ``limit``
    [batch] tokens allow."""
    wrong = (shape.sees[None] & ~(right | (shape.index == 0))[:, None, :]).sum(-1)
    return (wrong == 0) & (shape.depth[None] < limit.clamp_min(1)[:, None])


def path_to(shape: Tree, node: Tensor) -> Tensor:
    """The path [batch, nodes] from the root to a node [batch]; behind its end it has node 0."""
    on_path = shape.sees[node][:, None, :] & (shape.depth[None, None, :] == shape.index[None, :, None])
    return (on_path * shape.index).sum(-1)


def best_first(
    rates: list[float], fade: float, nodes: int, depth: int, below: list[float] | None = None
) -> tuple[int, ...]:
    """Parents of the tree that a proposer right with ``rates`` by rank grows, the likeliest nodes first.

    ``below`` are the rates of what is not a child of the root, where they are others.

    A node is right where its parent is and its rank is, which each level makes ``fade`` times as likely. The first n
    nodes are the best tree of n nodes (DySpec's greedy growth on expected rates), so that a host may take fewer.
    """
    parents, reach, depths = [-1], [1.0], [0]
    taken = [0]  # children of each node so far
    while len(parents) < nodes:
        right = [(rates if below is None or not i else below) for i in range(len(parents))]
        worth = [
            reach[i] * right[i][taken[i]] * fade ** depths[i]
            if taken[i] < len(right[i]) and depths[i] < depth
            else 0.0
            for i in range(len(parents))
        ]
        parent = max(range(len(parents)), key=worth.__getitem__)
        if not worth[parent]:
            break
        parents.append(parent)
        reach.append(worth[parent])
        depths.append(depths[parent] + 1)
        taken[parent] += 1
        taken.append(0)
    return tuple(parents)
