"""Logits processors keep what their definitions keep, and draws follow the probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from tokopt.errors import InputError
from tokopt.runtime import Sampling
from tokopt.runtime.sampling import MinP, RepetitionPenalty, Streams, TopH, TopK, TopP, Typical, choose

logits = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(2, 12)),
    # Multiples of a half: no two probabilities are nearly equal without being equal.
    elements=st.integers(-12, 12).map(lambda n: n / 2),
)
shares = st.sampled_from([0.05, 0.3, 0.5, 0.77, 0.95])


def probabilities(row: np.ndarray) -> list[float]:
    weight = [math.exp(float(x) - float(row.max())) for x in row]
    return [w / math.fsum(weight) for w in weight]


def kept(processed: np.ndarray) -> list[set[int]]:
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in processed]


def until(order: list[int], p: list[float], mass: float) -> set[int]:
    """The shortest prefix of ``order`` whose probabilities sum to ``mass`` or more."""
    found: set[int] = set()
    for token in order:
        if math.fsum(p[i] for i in found) >= mass - 1e-12:
            break
        found.add(token)
    return found


def descending(row: np.ndarray) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


@given(logits, st.integers(1, 15))
def test_top_k_keeps_the_k_largest_and_their_equals(x: np.ndarray, k: int) -> None:
    want = [{i for i, v in enumerate(row) if v >= sorted(row)[-min(k, len(row))]} for row in x]
    assert kept(TopK(k)([], x)) == want


@given(logits, shares)
def test_top_p_keeps_the_fewest_that_reach_p(x: np.ndarray, p: float) -> None:
    assert kept(TopP(p)([], x)) == [until(descending(row), probabilities(row), p) for row in x]


@given(logits, shares)
def test_min_p_keeps_what_is_near_the_likeliest(x: np.ndarray, p: float) -> None:
    want = [{i for i, q in enumerate(probabilities(row)) if q >= p * max(probabilities(row))} for row in x]
    assert kept(MinP(p)([], x)) == want


@given(logits, shares)
def test_typical_keeps_the_fewest_nearest_to_the_entropy(x: np.ndarray, mass: float) -> None:
    for row, got in zip(x, kept(Typical(mass)([], x)), strict=True):
        p = probabilities(row)
        entropy = -math.fsum(q * math.log(q) for q in p if q > 0)
        distance = [abs(-math.log(q) - entropy) for q in p]
        # Equal distances on both sides of the entropy differ by rounding: compare what was kept by distance.
        assert math.fsum(p[i] for i in got) >= mass - 1e-6
        farthest = max(distance[i] for i in got)
        assert all(i in got for i in range(len(p)) if distance[i] < farthest - 1e-6)
        without = math.fsum(p[i] for i in got) - min(p[i] for i in got if distance[i] > farthest - 1e-6)
        assert len(got) == 1 or without < mass + 1e-6


@given(logits, shares)
def test_top_h_keeps_a_share_of_the_entropy(x: np.ndarray, alpha: float) -> None:
    for row, got in zip(x, kept(TopH(alpha)([], x)), strict=True):
        p, order = probabilities(row), descending(row)
        terms = [-p[i] * math.log(p[i]) for i in order]
        n = len(got)
        assert got == set(order[:n]) and n >= 1
        limit = alpha * math.fsum(terms)
        assert n == 1 or math.fsum(terms[:n]) <= limit + 1e-9
        assert n == len(p) or math.fsum(terms[: n + 1]) > limit - 1e-9


def test_repetition_penalty_lowers_what_was_seen_whatever_its_sign() -> None:
    x = np.array([[2.0, -2.0, 1.0, -1.0]], np.float32)
    assert RepetitionPenalty(2.0)([[0, 1, 1]], x).tolist() == [[1.0, -4.0, 1.0, -1.0]]


@given(logits)
def test_neutral_options_change_nothing(x: np.ndarray) -> None:
    assert list(Sampling().processors()) == list(Sampling(temperature=1.0).processors()) == []
    for same in (TopK(99), TopP(1.0), Typical(1.0), TopH(1.0)):
        assert np.array_equal(same([], x.copy()), x)


@given(logits, shares)
def test_a_constant_added_to_all_logits_changes_nothing(x: np.ndarray, share: float) -> None:
    for process in (TopK(3), TopP(share), MinP(share), TopH(share)):
        assert kept(process([], x + np.float32(8))) == kept(process([], x))


@given(logits)
def test_something_is_always_left(x: np.ndarray) -> None:
    settings = Sampling(temperature=0.5, top_k=1, top_p=0.01, min_p=1.0, typical_p=0.01, top_h=0.01)
    for process in settings.processors():
        x = process([], x)
    assert all(kept(x))


def test_temperature_zero_takes_the_likeliest() -> None:
    x = np.array([[0.0, 3.0, 1.0], [5.0, -1.0, 0.0]], np.float32)
    assert choose(x, 0.0, Streams(0, 2)).tolist() == [1, 0]


def test_draws_follow_the_probabilities() -> None:
    row = np.array([0.0, 1.0, -np.inf, 2.0, -1.0], np.float32)
    streams = Streams(5, 1)
    drawn = [int(choose(row[None], 1.0, streams)[0]) for _ in range(20_000)]
    counts = np.bincount(drawn, minlength=5)
    assert counts[2] == 0
    want = np.array(probabilities(row)) * len(drawn)
    assert stats.chisquare(counts[want > 0], want[want > 0]).pvalue > 1e-3


def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    x = np.zeros((3, 50), np.float32)
    alone = choose(x[:1], 1.0, Streams(1, 1))
    assert choose(x, 1.0, Streams(1, 3))[0] == alone[0]


@pytest.mark.parametrize(
    "option",
    [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1}, {"typical_p": 0}]
    + [{"top_h": 2}, {"repetition_penalty": 0}, {"temperature": float("nan")}],
    ids=str,
)
def test_values_out_of_range_are_refused(option: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(option))} is .*, it must be"):
        Sampling(**option)
