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
from tokopt.runtime.speculation.planner.measured import ENOUGH, MEMORY, STALE, MeasuredNodes
from tokopt.runtime.speculation.tree import Tree

NODES, LIMIT = 8, 100
TREES = {
    "tree": best_first([0.55, 0.1, 0.06, 0.04], 1.0, NODES, 6),
    "chain": best_first([0.7], 1.0, NODES, 8),
}

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


def committed(source: np.random.Generator, tree: Tree, right: float, nodes: int) -> int:
    """Tokens of one call: a walk down the first nodes of the tree, and the token after its end."""
    at, tokens = 0, 1
    while True:
        chance, below = source.random(), [child for child in tree.children[at] if child < nodes]
        reached = np.cumsum([share(right, rank) for rank in range(len(below))])
        if not len(below) or chance >= reached[-1]:
            return tokens
        at, tokens = below[int((chance < reached).argmax())], tokens + 1


@cache
def expected(shape: str, right: float, nodes: int) -> float:
    """Tokens of a call on average: the sum over nodes of the chance to be accepted."""
    reached, tree = [1.0], Tree(np.array(TREES[shape]))
    for child in range(1, nodes):
        reached.append(reached[tree.parent[child]] * share(right, int(tree.rank[child])))
    return sum(reached)


def best(shape: str, cost: dict[int, float], right: float) -> float:
    return max(expected(shape, right, nodes) / seconds for nodes, seconds in cost.items())


Right = Callable[[int], float]


def run(
    shape: str,
    cost: dict[int, float],
    right: Right,
    calls: int,
    seed: int = 0,
    level: Right = lambda _: 1,
    disturbed: int = 0,
    times: float = 20,
) -> list[tuple]:
    """Nodes, tokens and undisturbed seconds of every call; one in two hundred takes ten times as long.

    Of the first ``disturbed`` calls, those of several nodes take ``times`` as long.
    """
    source, choice, made = np.random.default_rng(seed), MeasuredNodes.of(TREES[shape]), list[tuple]()
    tree = Tree(np.array(TREES[shape]))
    for call in range(calls):
        sure = int(level(call))
        nodes = choice.choose(sure, LIMIT)
        tokens = committed(source, tree, right(call), nodes)
        seconds = cost[nodes] * source.lognormal(0, 0.05) * (10 if source.random() < 0.005 else 1)
        seconds *= times if call < disturbed and nodes > 1 else 1
        choice = choice.observe(nodes, seconds, [(tokens, LIMIT)], sure)
        made.append((nodes, tokens, cost[nodes]))
    return made


def speed(made: list[tuple]) -> float:
    return sum(tokens for _, tokens, _ in made) / sum(seconds for _, _, seconds in made)


@pytest.mark.parametrize("shape", TREES)
def test_no_fixed_number_of_nodes_is_much_faster(shape: str) -> None:
    """Costs from none to in proportion, acceptance from none to nearly all, over 3,000 calls."""
    found = {
        (name, right): speed(run(shape, cost, lambda _, right=right: right, 3000)) / best(shape, cost, right)
        for (name, cost), right in itertools.product(COSTS.items(), (0.0, 0.5, 0.8, 0.95))
    }
    assert min(found.values()) > 0.95, found
    assert np.mean(list(found.values())) > 0.97, found


@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("name", ["kernels", "steps", "rows"])
def test_where_nothing_is_accepted_nearly_every_call_has_one_node(name: str, shape: str) -> None:
    made = run(shape, COSTS[name], lambda _: 0.0, 1000)
    assert [nodes for nodes, _, _ in made[50:]].count(1) > 0.8 * 950
    assert speed(made[50:]) > 0.97


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", TREES)
def test_speculation_comes_back_when_acceptance_rises(seed: int, shape: str) -> None:
    cost = COSTS["kernels"]
    made = run(shape, cost, lambda call: 0.0 if call < 500 else 0.95, 1500, seed)
    assert speed(made[50:500]) > 0.97
    assert speed(made[1000:]) > 0.88 * best(shape, cost, 0.95) > 1.1


@pytest.mark.parametrize("shape", TREES)
def test_a_disturbed_beginning_is_soon_forgotten(shape: str) -> None:
    """Programs that begin beside it, for example: they made one node look best for thousands of calls."""
    cost = COSTS["kernels"]
    made = run(shape, cost, lambda _: 0.95, 1200, disturbed=12)
    assert speed(made[600:]) > 0.95 * best(shape, cost, 0.95)


@pytest.mark.parametrize("name", ["kernels", "steps"])
def test_the_first_calls_of_a_text_may_be_disturbed(name: str) -> None:
    """By threads of another program that still spin: the text had no call of several nodes after them."""
    cost = COSTS[name]
    made = [run("chain", cost, lambda _: 1.3, 127, seed, disturbed=3, times=2.5) for seed in range(6)]
    assert np.mean([speed(text) for text in made]) > 0.8 * best("chain", cost, 1.3)


def test_what_is_sure_gets_more_nodes_than_what_is_not() -> None:
    """Levels are learned apart: of 0 nothing is proposed, of 1 nothing is right, of 3 nearly all."""
    cost, right = COSTS["kernels"], (0.0, 0.0, 0.5, 1.4)
    made = run("chain", cost, lambda call: right[call % 4], 2000, level=lambda call: call % 4)
    by_level = [[nodes for nodes, _, _ in made[1000 + level :: 4]] for level in range(4)]
    assert set(by_level[0]) == {1}
    assert by_level[1].count(1) > 0.7 * len(by_level[1])
    assert by_level[3].count(8) > 0.9 * len(by_level[3])


def test_seconds_count_once_there_are_enough_and_are_doubted_after_a_while() -> None:
    """A slow first call changes nothing; what is not known is hoped to cost no more than fewer nodes."""
    choice = MeasuredNodes.of(TREES["chain"])
    for size, calls in ((2, ENOUGH), (8, ENOUGH), (4, ENOUGH - 1)):
        for call in range(calls):
            seconds = COSTS["kernels"][size] if call else 50.0
            choice = choice.observe(size, seconds, [(1, LIMIT)], 0)
    assert [choice._cost(size) for size in choice.sizes] == [0.55, 1.1, 1.1, 1.7]
    for _ in range(2 * STALE):
        choice = choice.observe(1, 1.0, [(1, LIMIT)], 0)
    assert [choice._cost(size) for size in choice.sizes] == [1.0, 1.0, 1.1, 1.1]
    choice = choice.observe(8, 1.7, [(1, LIMIT)], 0)
    assert choice._cost(8) == 1.7


def test_fewer_nodes_of_a_chain_are_known_from_more() -> None:
    """And what a limit cut off says nothing."""
    chain = MeasuredNodes.of(TREES["chain"])
    for _ in range(4 * MEMORY):
        chain = chain.observe(8, 1.0, [(4, LIMIT), (3, 3)], 2)
    for size, tokens in ((1, 1.0), (2, 2.0), (4, 4.0)):
        assert chain._tokens(size, 2, LIMIT) == pytest.approx(tokens, abs=0.2)
    assert chain._tokens(8, 2, LIMIT) == pytest.approx(chain._tokens(4, 2, LIMIT), abs=0.2)
    assert chain._tokens(8, 2, 3) < chain._tokens(8, 2, LIMIT)


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_small_trees(nodes: int) -> None:
    choice = MeasuredNodes.of(TREES["chain"][:nodes])
    for _ in range(200):
        got = choice.choose(1, LIMIT)
        assert 1 <= got <= nodes
        choice = choice.observe(got, 1.0, [(1, LIMIT)], 1)


def test_a_token_that_is_the_last_or_that_nothing_is_proposed_for_needs_no_tree() -> None:
    choice = MeasuredNodes.of(TREES["tree"])
    assert choice.choose(1, 1) == choice.choose(0, LIMIT) == 1 < choice.choose(1, 2)


def test_a_tree_has_a_node() -> None:
    with pytest.raises(InputError):
        MeasuredNodes.of([])


@pytest.mark.parametrize("shape", TREES)
def test_the_host_in_node_chooses_alike(shape: str) -> None:
    """Call by call, through a fall and a rise of the acceptance."""
    source, choice, calls = np.random.default_rng(3), MeasuredNodes.of(TREES[shape]), list[list[float]]()
    tree, chosen = Tree(np.array(TREES[shape])), list[int]()
    for call in range(1500):
        level, limit = int(source.integers(0, 4)), int(source.choice([1, 3, LIMIT]))
        nodes = choice.choose(level, limit)
        tokens = min(limit, committed(source, tree, 0.0 if call < 400 else 0.3 * level, nodes))
        seconds = float(COSTS["kernels"][nodes] * source.lognormal(0, 0.05))
        chosen.append(nodes)
        calls.append([seconds, tokens, limit, level])
        choice = choice.observe(nodes, seconds, [(tokens, limit)], level)
    assert set(chosen) == {1, 2, 4, 8}
    assert node.choose_nodes(TREES[shape], calls) == chosen
