"""The number of nodes that calls get, on simulated costs and acceptances."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from tests import node
from tokopt.errors import InputError
from tokopt.passes.speculate.tree import best_first
from tokopt.runtime.speculation.planner.measured import MeasuredNodes
from tokopt.runtime.speculation.tree import Tree

NODES = 8
TREE = Tree(np.array(best_first([0.55, 0.1, 0.06, 0.04], 1.0, NODES, 6)))

COSTS = {
    "free": {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0},
    "kernels": {1: 1.0, 2: 1.1, 4: 1.3, 8: 1.7},
    "steps": {1: 1.0, 2: 1.9, 4: 2.0, 8: 2.2},
    "rows": {1: 1.0, 2: 2.0, 4: 4.0, 8: 7.0},
}
"""Seconds of a call by its nodes."""


def share(right: float, rank: int) -> float:
    """How often a child of a rank is the one accepted, where one is with probability ``right``."""
    return right * 0.7 * 0.3**rank


def committed(source: np.random.Generator, right: float, nodes: int) -> int:
    """Tokens of one call: a walk down the first nodes of the tree, and the token after its end."""
    at, tokens = 0, 1
    while True:
        chance, below = source.random(), [child for child in TREE.children[at] if child < nodes]
        reached = np.cumsum([share(right, rank) for rank in range(len(below))])
        if not len(below) or chance >= reached[-1]:
            return tokens
        at, tokens = below[int((chance < reached).argmax())], tokens + 1


@cache
def expected(right: float, nodes: int) -> float:
    """Tokens of a call on average: the sum over nodes of the chance to be accepted."""
    reached = [1.0]
    for child in range(1, nodes):
        reached.append(reached[TREE.parent[child]] * share(right, int(TREE.rank[child])))
    return sum(reached)


def best(cost: dict[int, float], right: float) -> float:
    return max(expected(right, nodes) / seconds for nodes, seconds in cost.items())


def run(cost: dict[int, float], right: Callable[[int], float], calls: int, seed: int = 0) -> list[tuple]:
    """Nodes, tokens and undisturbed seconds of every call; one in two hundred takes ten times as long."""
    source, choice, made = np.random.default_rng(seed), MeasuredNodes.of(NODES), list[tuple]()
    for call in range(calls):
        nodes = choice.nodes
        tokens = committed(source, right(call), nodes)
        seconds = cost[nodes] * source.lognormal(0, 0.05) * (10 if source.random() < 0.005 else 1)
        choice = choice.observe(nodes, seconds, tokens)
        made.append((nodes, tokens, cost[nodes]))
    return made


def speed(made: list[tuple]) -> float:
    return sum(tokens for _, tokens, _ in made) / sum(seconds for _, _, seconds in made)


def test_no_fixed_number_of_nodes_is_much_faster() -> None:
    """Costs from none to in proportion, acceptance from none to nearly all, over 3,000 calls."""
    found = {
        (name, right): speed(run(cost, lambda _, right=right: right, 3000)) / best(cost, right)
        for (name, cost), right in itertools.product(COSTS.items(), (0.0, 0.5, 0.8, 0.95))
    }
    assert min(found.values()) > 0.95, found
    assert np.mean(list(found.values())) > 0.97, found


@pytest.mark.parametrize("name", ["kernels", "steps", "rows"])
def test_where_nothing_is_accepted_nearly_every_call_has_one_node(name: str) -> None:
    made = run(COSTS[name], lambda _: 0.0, 1000)
    assert [nodes for nodes, _, _ in made[50:]].count(1) > 0.9 * 950
    assert speed(made[50:]) > 0.97


@pytest.mark.parametrize("seed", range(3))
def test_speculation_comes_back_when_acceptance_rises(seed: int) -> None:
    cost = COSTS["kernels"]
    made = run(cost, lambda call: 0.0 if call < 500 else 0.95, 1500, seed)
    assert speed(made[50:500]) > 0.97
    assert speed(made[1000:]) > 0.88 * best(cost, 0.95) > 1.6


def test_every_size_is_tried_once_and_the_first_call_of_a_size_is_not_timed() -> None:
    """The whole tree first, then one node, then powers of 2; a slow first call changes nothing."""
    choice, order = MeasuredNodes.of(12), list[int]()
    assert [size.nodes for size in choice.sizes] == [12, 1, 8, 4, 2]
    while any(not size.seconds for size in choice.sizes):
        first = not order or order[-1] != choice.nodes
        order.append(choice.nodes)
        choice = choice.observe(choice.nodes, 50.0 if first else choice.nodes, 1)
    assert list(dict.fromkeys(order)) == [12, 1, 8, 4, 2]
    assert all(set(size.seconds) == {size.nodes} for size in choice.sizes)


@pytest.mark.parametrize("nodes", [1, 2])
def test_small_trees(nodes: int) -> None:
    choice = MeasuredNodes.of(nodes)
    for _ in range(200):
        assert 1 <= choice.nodes <= nodes
        choice = choice.observe(choice.nodes, 1.0, 1.0)


def test_a_tree_has_a_node() -> None:
    with pytest.raises(InputError):
        MeasuredNodes.of(0)


def test_the_host_in_node_chooses_alike() -> None:
    """Call by call, through a fall and a rise of the acceptance."""
    source, choice, calls = np.random.default_rng(3), MeasuredNodes.of(NODES), list[list[float]]()
    for call in range(1500):
        nodes = choice.nodes
        tokens = committed(source, 0.0 if call < 400 else 0.9, nodes)
        calls.append([nodes, float(COSTS["kernels"][nodes] * source.lognormal(0, 0.05)), tokens])
        choice = choice.observe(*calls[-1])  # type: ignore[arg-type]
    assert {nodes for nodes, _, _ in calls} == {1, 2, 4, 8}
    assert node.choose_nodes(NODES, [call[1:] for call in calls]) == [call[0] for call in calls]
