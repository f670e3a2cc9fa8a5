"""Which number of nodes a generation's calls get, and when it is said that nothing is accepted."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from tokopt.errors import InputError
from tokopt.runtime.speculation.calls import WATCHED, Speculation, Trees


def test_a_token_that_is_the_last_needs_no_tree() -> None:
    """And says nothing about how many nodes pay."""
    model = Speculation("model.tokopt", 8)
    trees, last = Trees(model, None), np.array([1, 0])
    assert trees.next(np.array([5, 0])) == 8 and trees.next(last) == 1
    trees.observe(1, 1.0, np.array([1, 0]), last)
    assert model.measured(2).last == 0


def test_batches_are_measured_apart_and_texts_together() -> None:
    model = Speculation("model.tokopt", 8)
    for _ in range(4):
        trees = Trees(model, None)
        trees.observe(trees.next(np.array([9])), 1.0, np.array([1]), np.array([9]))
    assert model.measured(1).nodes == 1 and model.measured(2).nodes == 8


def test_a_number_that_the_caller_says_is_kept_and_teaches_nothing() -> None:
    model = Speculation("model.tokopt", 8)
    trees, limit = Trees(model, 3), np.array([9])
    for _ in range(20):
        assert trees.next(limit) == 3
        trees.observe(3, 1.0, np.array([2]), limit)
    assert model.measured(1).last == 0
    with pytest.raises(InputError, match="nodes"):
        Trees(model, 9)


@pytest.mark.parametrize(
    ("nodes", "accepted", "said"),
    [(8, 0, True), (8, WATCHED // 16, False), (1, 0, False)],
    ids=["nothing", "something", "nothing proposed"],
)
def test_a_warning_needs_proposals_none_of_which_is_accepted(nodes: int, accepted: int, said: bool) -> None:
    model = Speculation("model.tokopt", 8)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for call in range(3 * WATCHED):
            model.watch(nodes, 1 + (call % WATCHED < accepted))
    assert [str(warning.message)[:12] for warning in found] == ["model.tokopt"] * said
