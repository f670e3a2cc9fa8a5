"""Draft trees keep the laws of trees, whatever their shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokopt.errors import InputError
from tokopt.runtime.speculation.draft import Draft, Drawn
from tokopt.runtime.speculation.tree import Branches, Tree, merge_duplicates


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    nodes = draw(st.integers(1, 12))
    return Tree(np.array([-1, *(draw(st.integers(0, node - 1)) for node in range(1, nodes))]))


def ancestors(tree: Tree, node: int) -> list[int]:
    """A node and what is above it, up to the root, by following parents alone."""
    return [node, *(ancestors(tree, int(tree.parent[node])) if node else [])]


@given(trees())
def test_depth_mask_and_paths_follow_from_the_parents(tree: Tree) -> None:
    for node in range(tree.nodes):
        above = ancestors(tree, node)
        assert tree.path(node) == tuple(above[::-1])
        assert tree.depth[node] == len(above) - 1
        assert set(np.flatnonzero(tree.mask[node]).tolist()) == set(above)
    leaves = set(range(tree.nodes)) - set(tree.parent.tolist())
    assert tree.paths == tuple(tree.path(leaf) for leaf in sorted(leaves))


@given(trees())
def test_ranks_count_older_siblings(tree: Tree) -> None:
    for node in range(1, tree.nodes):
        assert tree.rank[node] == sum(tree.parent[other] == tree.parent[node] for other in range(node))
        assert tree.children[tree.parent[node]][tree.rank[node]] == node
    assert tree.rank[0] == 0


@given(trees(), st.data())
def test_keeping_nodes_drops_what_is_below_the_others(tree: Tree, data: st.DataObject) -> None:
    kept = np.array([data.draw(st.booleans()) for _ in range(tree.nodes)])
    kept[0] = True
    smaller, old = tree.keep(kept)
    assert old.tolist() == [n for n in range(tree.nodes) if all(kept[a] for a in ancestors(tree, n))]
    for node in range(1, smaller.nodes):
        assert old[smaller.parent[node]] == tree.parent[old[node]]


@given(trees(), st.data())
def test_merging_keeps_every_text_once(tree: Tree, data: st.DataObject) -> None:
    tokens = np.array([data.draw(st.integers(0, 2)) for _ in range(tree.nodes)])
    merged, ids, new = merge_duplicates(tree, tokens)

    def texts(tree: Tree, tokens: np.ndarray) -> list[tuple[int, ...]]:
        return [tuple(tokens[list(tree.path(node))].tolist()) for node in range(tree.nodes)]

    before, after = texts(tree, tokens), texts(merged, ids)
    assert len(set(after)) == len(after) and set(after) == set(before)
    assert [after[node] for node in new] == before
    again, same, identity = merge_duplicates(merged, ids)
    np.testing.assert_array_equal(again.parent, merged.parent)
    np.testing.assert_array_equal(same, ids)
    np.testing.assert_array_equal(identity, np.arange(merged.nodes))


def test_the_first_of_equal_siblings_keeps_its_place() -> None:
    tree, tokens, new = merge_duplicates(Tree(np.array([-1, 0, 0, 0, 3, 1])), [9, 5, 6, 5, 7, 8])
    assert tokens.tolist() == [9, 5, 6, 7, 8] and new.tolist() == [0, 1, 2, 1, 3, 4]
    assert tree.parent.tolist() == [-1, 0, 0, 1, 1]


def test_a_chain_is_the_simplest_tree() -> None:
    tree = Tree.chain(4)
    assert tree.parent.tolist() == [-1, 0, 1, 2] and tree.paths == ((0, 1, 2, 3),)
    np.testing.assert_array_equal(tree.mask, np.tri(4, dtype=bool))
    assert Tree.chain(1).nodes == 1


def test_a_path_stops_where_the_nodes_are_used_up() -> None:
    branches = Branches(0)
    assert branches.extend([1, 2, 3], 3) == [1, 2]
    assert branches.extend([1, 2, 4], 3) == [1, 2], "nodes that are there cost nothing"
    assert branches.tokens == [0, 1, 2] and len(branches) == 3


@pytest.mark.parametrize(
    ("parent", "reason"),
    [
        ([], "shape"),
        ([[-1]], "shape"),
        ([-1.0, 0.0], "dtype float64"),
        ([0], "parent of node 0"),
        ([-1, -1], "parent of node 1 is -1"),
        ([-1, 2, 0], "parent of node 1 is 2"),
        ([-1, 0, 2], "parent of node 2 is 2"),
    ],
)
def test_what_is_no_tree_is_refused(parent: list, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Tree(np.array(parent))


@pytest.mark.parametrize("tokens", [[1], [1, 2, 3], [0.5, 1.0], [1, -1]])
def test_a_draft_has_one_token_per_node(tokens: list) -> None:
    with pytest.raises(InputError, match="one per node"):
        Draft(Tree.chain(2), np.array(tokens), Drawn.DETERMINISTIC)
    if len(tokens) != 2:
        with pytest.raises(InputError, match="one per node"):
            merge_duplicates(Tree.chain(2), tokens)


def test_the_callers_array_is_not_shared() -> None:
    parent = np.array([-1, 0])
    tree = Tree(parent)
    parent[1] = 5
    assert tree.parent.tolist() == [-1, 0]
    with pytest.raises(ValueError, match="read-only"):
        tree.parent[1] = 5
