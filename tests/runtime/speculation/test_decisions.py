"""One uniform per decision, by the inverse of the cumulative distribution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Uniforms

LAST = float(np.nextafter(1.0, 0.0))
uniforms = st.one_of(st.floats(0, LAST), st.sampled_from([0.0, LAST, 0.5]))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8).filter(any), uniforms)
def test_a_draw_is_the_inverse_of_the_cumulative_sum(weights: list[int], uniform: float) -> None:
    p = np.array(weights) / sum(weights)
    token = Uniforms(np.array([uniform])).draw(p)
    assert p[token] > 0
    assert p[:token].sum() <= uniform + 1e-12 and uniform <= p[: token + 1].sum() + 1e-12


@given(st.integers(1, 6), st.integers(1, 6))
def test_tokens_get_their_share_of_the_unit_interval(a: int, b: int) -> None:
    grid = (np.arange(a + b) + 0.5) / (a + b)
    p = np.array([0, a, 0, b, 0]) / (a + b)
    source = Uniforms(grid)
    assert [source.draw(p) for _ in grid] == [1] * a + [3] * b


@given(uniforms)
def test_certain_outcomes_are_certain(uniform: float) -> None:
    source = Uniforms(np.full(3, uniform))
    assert source.bernoulli(1.0) is True and source.bernoulli(0.0) is False
    assert source.draw(np.array([0.0, 1.0, 0.0])) == 1
    assert source.used == 3, "a decision takes a uniform also where its outcome is certain"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6).filter(any))
def test_the_largest_uniform_draws_a_possible_token(weights: list[float]) -> None:
    """Whatever the sum, which need not be 1 to the last bit."""
    token = Uniforms(np.array([LAST])).draw(np.array(weights))
    assert weights[token] > 0


def test_uniforms_are_taken_in_order_and_run_out() -> None:
    source = Uniforms(np.array([0.1, 0.9], np.float32))
    assert source.bernoulli(0.5) and not source.bernoulli(0.5) and source.used == 2
    with pytest.raises(InputError, match="all 2 uniforms are used"):
        source.bernoulli(0.5)


@pytest.mark.parametrize("given", [[1.0], [-0.1], [np.nan], [[0.5]]])
def test_numbers_outside_of_the_unit_interval_are_refused(given: list) -> None:
    with pytest.raises(InputError, match="uniforms must be"):
        Uniforms(np.array(given))
