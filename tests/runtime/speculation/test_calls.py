"""Which number of nodes a generation's calls get, and when it is said that nothing is accepted."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from tokopt.errors import InputError
from tokopt.runtime.speculation.calls import WATCHED, Speculation, Trees

CHAIN = (-1, *range(7))


def test_a_token_that_is_the_last_needs_no_tree() -> None:
    trees = Trees(Speculation("model.tokopt", CHAIN), None)
    assert trees.next(np.array([5, 0])) == 8 and trees.next(np.array([1, 0])) == 1


def test_what_is_proposed_follows_the_surest_row_that_goes_on() -> None:
    """Of a program that says nothing of it something is hoped; where nothing is proposed there is one node."""
    trees, limit = Trees(Speculation("model.tokopt", CHAIN), None), np.array([5, 5, 0])
    for confidence, nodes in (((0, 2, 0), 8), ((0, 0, 3), 1), (None, 8)):
        trees.sure(None if confidence is None else np.array(confidence), limit)
        assert trees.next(limit) == nodes


def test_batches_are_measured_apart_and_texts_together() -> None:
    model = Speculation("model.tokopt", CHAIN)
    for _ in range(20):
        trees = Trees(model, None)
        nodes = trees.next(np.array([9]))
        trees.observe(nodes, float(nodes), np.array([1]), np.array([9]))
    assert Trees(model, None).next(np.array([9])) == 1 and Trees(model, None).next(np.array([9, 9])) == 8


def test_a_number_that_the_caller_says_is_kept_and_teaches_nothing() -> None:
    model = Speculation("model.tokopt", CHAIN)
    trees, limit = Trees(model, 3), np.array([9])
    for _ in range(20):
        assert trees.next(limit) == 3
        trees.observe(3, 1.0, np.array([2]), limit)
    assert model.measured(1).calls == 0
    with pytest.raises(InputError, match="nodes"):
        Trees(model, 9)


@pytest.mark.parametrize(
    ("nodes", "accepted", "said"),
    [(8, 0, True), (8, WATCHED // 16, False), (1, 0, False)],
    ids=["nothing", "something", "nothing proposed"],
)
def test_a_warning_needs_proposals_none_of_which_is_accepted(nodes: int, accepted: int, said: bool) -> None:
    model = Speculation("model.tokopt", CHAIN)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for call in range(3 * WATCHED):
            model.watch(nodes, 1 + (call % WATCHED < accepted))
    assert [str(warning.message)[:12] for warning in found] == ["model.tokopt"] * said
