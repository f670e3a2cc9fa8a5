"""Planners find what brute force finds on small trees."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.speculation.toys import branches, distribution_of, error_of, sequences, toy
from tokopt.errors import InputError
from tokopt.runtime.rows import RowCosts
from tokopt.runtime.speculation.acceptance import Acceptance
from tokopt.runtime.speculation.decisions import Uniforms
from tokopt.runtime.speculation.planner.dyspec import grow_tree
from tokopt.runtime.speculation.planner.nodes import plan_nodes
from tokopt.runtime.speculation.planner.sequoia import Sequoia, expected_tokens
from tokopt.runtime.speculation.planner.shapes import AGAIN, Shapes
from tokopt.runtime.speculation.rules.without_replacement import WithoutReplacement
from tokopt.runtime.speculation.tree import Tree


def every_tree(nodes: int) -> Iterator[Tree]:
    """All trees of so many nodes: each node after the first below any node before it."""
    for parents in itertools.product(*(range(node) for node in range(1, nodes))):
        yield Tree(np.array([-1, *parents]))


def by_hand(tree: Tree, shares: np.ndarray) -> float:
    """The sum over nodes of the product of the shares on the way to them."""
    total = 0.0
    for node in range(tree.nodes):
        reached = 1.0
        for below in tree.path(node)[1:]:
            depth, rank = int(tree.depth[below]) - 1, int(tree.rank[below])
            reached *= shares[depth][rank] if depth < len(shares) and rank < len(shares[0]) else 0
        total += reached
    return total


def shares(seed: int, depths: int, ranks: int) -> np.ndarray:
    """Any shares of acceptance: not always falling with the rank."""
    return np.random.default_rng(seed).dirichlet(np.ones(ranks + 1), depths)[:, :ranks]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("depths", "ranks"), [(3, 2), (1, 5), (5, 1), (4, 4)])
def test_no_tree_gives_more_than_sequoias(seed: int, depths: int, ranks: int) -> None:
    given = shares(seed, depths, ranks)
    planned = Sequoia(given, 6)
    for nodes in range(1, 7):
        inside = [
            tree
            for tree in every_tree(nodes)
            if tree.depth.max() <= depths and max(map(len, tree.children)) <= ranks
        ]
        if not inside:
            assert planned.expected[nodes] == -np.inf
            with pytest.raises(InputError, match="ask for fewer"):
                planned.tree(nodes)
            continue
        best = max(by_hand(tree, given) for tree in inside)
        assert planned.expected[nodes] == pytest.approx(best, abs=1e-12)
        found = planned.tree(nodes)
        assert found.nodes == nodes and (np.diff(found.depth) >= 0).all()
        assert by_hand(found, given) == pytest.approx(best, abs=1e-12)
        assert expected_tokens(found, given) == pytest.approx(best, abs=1e-12)


def test_expectation_is_what_calls_commit_on_average() -> None:
    """A walk that takes the child of rank r with its share, else none, commits so many tokens."""
    given, tree = shares(3, 3, 2), Tree(np.array([-1, 0, 0, 1, 1, 2, 3]))
    total = 0.0

    def walk(node: int, weight: float) -> None:
        nonlocal total
        total += weight  # the node's call commits one token behind it
        for rank, child in enumerate(tree.children[node]):
            walk(child, weight * given[tree.depth[node], rank])

    walk(0, 1.0)
    assert expected_tokens(tree, given) == pytest.approx(total, abs=1e-14)


def test_one_child_per_node_gives_a_chain() -> None:
    planned = Sequoia(np.full((5, 1), 0.5), 6)
    np.testing.assert_array_equal(planned.tree(6).parent, Tree.chain(6).parent)
    np.testing.assert_allclose(planned.expected[1:], 2 - 0.5 ** np.arange(6))


# How many nodes

COSTS = RowCosts({1: 1.0, 2: 1.1, 4: 1.4, 8: 2.2, 16: 4.0}, {})


@given(st.integers(0, 50), st.sampled_from([0.0, 0.3]))
def test_no_number_of_nodes_is_faster(seed: int, drafting: float) -> None:
    given = shares(seed, 4, 3)
    plan = plan_nodes(COSTS.seconds, given, drafting)
    planned = Sequoia(given, 16)
    for nodes in range(1, 17):
        cost = float(np.interp(nodes, list(COSTS.seconds), list(COSTS.seconds.values())))
        assert planned.expected[nodes] / (cost + drafting * (nodes > 1)) <= plan.speed + 1e-12
    assert plan.tokens == pytest.approx(expected_tokens(plan.tree, given))
    assert plan.speed >= 1


@pytest.mark.parametrize(
    ("costs", "share", "drafting"),
    [
        ({1: 1.0, 2: 2.0, 4: 4.0}, 0.9, 0.0),
        ({1: 1.0, 2: 1.0, 4: 1.0}, 0.0, 0.0),
        ({1: 1.0, 2: 1.1, 4: 1.2}, 0.5, 5.0),
        ({1: 1.0}, 0.9, 0.0),
    ],
    ids=["rows cost", "nothing accepted", "drafting costs", "one row"],
)
def test_where_speculation_loses_the_root_is_alone(costs: dict, share: float, drafting: float) -> None:
    plan = plan_nodes(costs, np.full((3, 2), share / 2), drafting)
    assert plan.tree.nodes == 1 and plan.speed == 1 and plan.tokens == 1


def test_free_rows_are_all_used() -> None:
    plan = plan_nodes({1: 1.0, 8: 1.0}, np.array([[0.5, 0.2]] * 4))
    assert plan.tree.nodes == 8


@pytest.mark.parametrize(
    ("costs", "given", "drafting"),
    [
        ({}, np.ones((1, 1)), 0),
        ({2: 1.0}, np.ones((1, 1)), 0),
        ({1: 0.0}, np.ones((1, 1)), 0),
        ({1: np.nan}, np.ones((1, 1)), 0),
        ({1: 1.0}, np.ones(1), 0),
        ({1: 1.0}, np.full((1, 1), np.nan), 0),
        ({1: 1.0}, np.full((1, 1), 1.5), 0),
        ({1: 1.0}, np.ones((1, 1)), -1),
    ],
)
def test_bad_plans(costs: dict, given: np.ndarray, drafting: float) -> None:
    with pytest.raises(InputError):
        plan_nodes(costs, given, drafting)


# Acceptance


def test_every_beginning_of_a_shape_is_the_best_tree_of_its_size() -> None:
    """Before anything was seen, and after a hundred trees whose second child was accepted most often."""
    shapes = Shapes(12, 4, chain=False)
    before = shapes.parents
    for _ in range(2 * AGAIN):
        shapes.observe(Tree(np.array([-1, 0, 0, 0, 0])), np.array([0, 2]))
    assert shapes.parents != before
    for parents, counts in (
        (before, Shapes(12, 4, chain=False).acceptance),
        (shapes.parents, shapes.acceptance),
    ):
        shares = np.minimum.accumulate(counts.shares, axis=1)
        best = Sequoia(shares, 12)
        for nodes in range(1, 13):
            assert expected_tokens(Tree(np.array(parents[:nodes])), shares) == pytest.approx(
                best.expected[nodes]
            )
    assert Shapes(5, 4, chain=True).parents == (-1, 0, 1, 2, 3)


def test_shares_start_at_the_prior_and_go_to_what_is_seen() -> None:
    prior = np.array([[0.6, 0.2], [0.5, 0.1]])
    counts = Acceptance.assume(prior, weight=4)
    np.testing.assert_array_equal(counts.shares, prior)
    tree = Tree(np.array([-1, 0, 0, 1, 2]))  # both children of the root have one child
    for _ in range(1000):
        counts = counts.observe(tree, np.array([0, 2]))
    np.testing.assert_allclose(counts.shares[0], [0, 1], atol=0.01)
    np.testing.assert_allclose(counts.shares[1], [0, 0.1], atol=0.01)
    np.testing.assert_array_equal(counts.offered, [[1000, 1000], [1000, 0]])


@given(st.integers(0, 100))
def test_counts_are_those_of_a_walk_by_hand(seed: int) -> None:
    source = np.random.default_rng(seed)
    counts = Acceptance.assume(np.full((2, 2), 0.3))
    offered, accepted = np.zeros((2, 2)), np.zeros((2, 2))
    for _ in range(5):
        nodes = int(source.integers(1, 9))
        tree = Tree(np.array([-1, *(source.integers(node) for node in range(1, nodes))]))
        path = tree.path(int(source.integers(nodes)))
        counts = counts.observe(tree, np.array(path))
        for node in range(1, nodes):
            depth, rank = int(tree.depth[node]) - 1, int(tree.rank[node])
            if depth < 2 and rank < 2 and int(tree.parent[node]) in path:
                offered[depth, rank] += 1
                accepted[depth, rank] += node in path
    np.testing.assert_array_equal(counts.offered, offered)
    np.testing.assert_array_equal(counts.accepted, accepted)
    assert ((counts.shares >= 0) & (counts.shares <= 1)).all()


@pytest.mark.parametrize(
    ("prior", "weight"),
    [(np.ones(2), 1), (np.full((1, 1), 1.1), 1), (np.full((1, 1), np.nan), 1), (np.ones((1, 1)), 0)],
)
def test_a_prior_that_is_none(prior: np.ndarray, weight: float) -> None:
    with pytest.raises(InputError):
        Acceptance.assume(prior, weight)


# DySpec


def slots_of(drafter, uniforms: dict, depth: int) -> dict[tuple, float]:
    """Every slot (the tokens before it, its rank) down to a depth with its value, where each slot's draw is given."""
    found: dict[tuple, float] = {}

    def visit(prefix: tuple[int, ...], value: float) -> None:
        if len(prefix) > depth:
            return
        q = drafter(prefix).copy()
        for rank in range(np.count_nonzero(q)):
            found[prefix, rank] = value
            token = Uniforms(np.array([uniforms[prefix, rank]])).draw(q)
            children[prefix, rank] = (*prefix, token)
            visit((*prefix, token), value * q[token])
            value *= 1 - q[token]
            q[token] = 0
            q /= max(q.sum(), 1e-300)

    children: dict[tuple, tuple] = {}
    visit((0,), 1.0)
    return {(prefix, rank, children[prefix, rank]): value for (prefix, rank), value in found.items()}


@pytest.mark.parametrize("seed", range(10))
def test_no_tree_that_grows_slot_by_slot_has_a_larger_value(seed: int) -> None:
    """Draws are coupled: a slot's child is the same whenever it is drawn, so that all trees can be compared."""
    source, size, nodes = np.random.default_rng(seed), 3, 5
    drafter = toy(size, seed)
    prefixes = [(0, *rest) for n in range(nodes) for rest in itertools.product(range(size), repeat=n)]
    uniforms = {(prefix, rank): source.random() for prefix in prefixes for rank in range(size)}
    slots = slots_of(drafter, uniforms, nodes)
    before = {slot: needed(slot, slots) for slot in slots}
    closed = {frozenset[tuple]()}
    for _ in range(nodes - 1):
        closed = {some | {s} for some in closed for s in slots if s not in some and before[s] <= some}
    best = max(sum(slots[s] for s in some) for some in closed)

    draft = grow_tree(0, drafter, nodes, InSlots(drafter, uniforms))
    grown = [
        (text_of(draft, int(draft.tree.parent[node])), int(draft.tree.rank[node]), text_of(draft, node))
        for node in range(1, draft.tree.nodes)
    ]
    assert frozenset(grown) in closed
    assert sum(slots[s] for s in grown) == pytest.approx(best, abs=1e-12)


def text_of(draft, node: int) -> tuple[int, ...]:
    return tuple(draft.tokens[list(draft.tree.path(node))].tolist())


def needed(slot: tuple, slots: dict) -> frozenset:
    """The slots that must be drawn before this one: that of its prefix, and that of its older sibling."""
    prefix, rank, _ = slot
    return frozenset(s for s in slots if s[2] == prefix or (s[0] == prefix and s[1] == rank - 1))


class InSlots:
    """Draws with the number of the slot, which is found by its distribution."""

    def __init__(self, drafter, uniforms: dict) -> None:
        self.table: dict[bytes, float] = {}
        for (prefix, rank), uniform in uniforms.items():
            for gone in itertools.permutations(range(3), rank):
                q = drafter(prefix).copy()
                for token in gone:
                    q[token] = 0
                    q = q / q.sum() if q.sum() > 0 else q
                self.table[np.round(q, 12).tobytes()] = uniform

    def bernoulli(self, probability: float) -> bool:
        raise AssertionError("drawing a tree takes no such decision")

    def draw(self, distribution: np.ndarray) -> int:
        return Uniforms(np.array([self.table[np.round(distribution, 12).tobytes()]])).draw(distribution)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(2))
def test_a_grown_tree_is_verified_without_bias(nodes: int, seed: int) -> None:
    """Its shape depends on what was drawn, but whether a child is drawn never on the child."""
    drafter, target = toy(3, seed + 100, zeros=0.2), toy(3, seed)
    found = distribution_of(
        WithoutReplacement(), lambda decisions: grow_tree(0, drafter, nodes, decisions), target, nodes
    )
    assert error_of(found, sequences(target, (0,), nodes)) < 1e-12


def test_a_threshold_ends_growth() -> None:
    drafter = toy(4, 1)
    for draft, _ in branches(lambda decisions: grow_tree(0, drafter, 20, decisions, least=0.9)):
        assert draft.tree.nodes < 20
        q = drafter((0,))
        below = q[draft.tokens[1]] >= 0.9
        beside = 1 - q[draft.tokens[1]] >= 0.9
        assert draft.tree.nodes > 2 or not (below or beside)
    assert grow_tree(0, lambda _: np.zeros(4), 5, Uniforms(np.array([]))).tree.nodes == 1
    with pytest.raises(InputError):
        grow_tree(0, drafter, 0, Uniforms(np.array([])))
