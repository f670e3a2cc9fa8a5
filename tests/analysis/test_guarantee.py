"""The promise of learn-then-test: known numbers, an exact binomial, and how often the promise is broken."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from tokopt.analysis.guarantee import Promise, binomial_cdf, p_value


def exact_cdf(most: int, count: int, probability: Fraction) -> Fraction:
    terms = (math.comb(count, k) * probability**k * (1 - probability) ** (count - k) for k in range(most + 1))
    return sum(terms, Fraction(0))


@pytest.mark.parametrize(("count", "risk"), [(1, "1/2"), (7, "1/3"), (200, "1/20"), (1000, "1/100")])
def test_the_binomial_is_that_of_whole_numbers(count: int, risk: str) -> None:
    for most in {0, 1, count // 50, count // 2, count - 1, count}:
        exact = float(exact_cdf(most, count, Fraction(risk)))
        assert binomial_cdf(most, count, float(Fraction(risk))) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(
    ("count", "tolerance", "confidence", "errors"),
    [(200, 0.05, 0.95, 3), (500, 0.02, 0.9, 4), (1000, 0.01, 0.95, 3)],
)
def test_so_many_errors_are_allowed(count: int, tolerance: float, confidence: float, errors: int) -> None:
    promise = Promise(tolerance, confidence)
    assert promise.allowed(count) == errors
    assert promise.holds(errors, count) and not promise.holds(errors + 1, count)


@pytest.mark.parametrize(
    ("tolerance", "confidence", "needed"), [(0.01, 0.95, 299), (0.01, 0.9, 230), (0.05, 0.95, 59)]
)
def test_so_many_inputs_without_an_error_are_needed(tolerance: float, confidence: float, needed: int) -> None:
    promise = Promise(tolerance, confidence)
    assert promise.needed == needed
    assert promise.holds(0, needed) and not promise.holds(0, needed - 1)
    assert promise.allowed(needed) == 0 and promise.allowed(needed - 1) == -1


def test_counts_stay_whole() -> None:
    """Three errors of 200 are three: it takes the sum, since the mean times 200 may be a little above."""
    assert p_value(3, 200, 0.05) == pytest.approx(math.e * float(exact_cdf(3, 200, Fraction(1, 20))))
    assert p_value(math.nextafter(3, 4), 200, 0.05) > p_value(3, 200, 0.05)
    above = [(k, n) for n in (200, 500, 1000, 2999) for k in range(n // 20) if math.ceil(n * (k / n)) > k]
    assert above  # the trap is there
    for errors, count in above:
        assert p_value(errors, count, 0.1) < p_value(count * (errors / count), count, 0.1)


@pytest.mark.parametrize("count", [59, 200, 299, 1000])
@pytest.mark.parametrize("risk", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("level", [0.05, 0.1])
def test_one_setting_at_the_tolerance_is_taken_at_most_as_often_as_promised(
    count: int, risk: float, level: float
) -> None:
    """Exactly, over all numbers of errors that a setting with just this risk may make."""
    allowed = Promise(risk, 1 - level).allowed(count)
    assert binomial_cdf(allowed, count, risk) <= level


@pytest.mark.parametrize(("tolerance", "confidence"), [(0.05, 0.9), (0.1, 0.8)])
def test_random_splits_break_the_promise_at_most_as_often_as_promised(
    tolerance: float, confidence: float
) -> None:
    """Settings that err more and more; of many draws, the one chosen has too large a risk in few."""
    random, settings, count, draws = np.random.default_rng(5), 25, 300, 3000
    risks = np.linspace(0.1, 2.2, settings) * tolerance
    promise = Promise(tolerance, confidence)
    broken = chosen = 0
    for _ in range(draws):
        uniform = random.random(count)  # an input's errors are nested, as those of thresholds are
        errors = (uniform[None] < risks[:, None]).sum(1)
        place = promise.last(errors.tolist(), count)
        chosen += place is not None
        broken += place is not None and risks[place] > tolerance
    assert chosen > draws / 2  # the promise is not kept by promising nothing
    assert broken <= draws * (1 - confidence) + 3 * math.sqrt(draws * (1 - confidence) * confidence)


def test_losses_between_zero_and_one_keep_the_promise_too() -> None:
    """A cosine distance is no count; the bound holds for any loss in [0, 1]."""
    random, draws, count, tolerance = np.random.default_rng(6), 2000, 250, 0.05
    promise, broken = Promise(tolerance, 0.9), 0
    for _ in range(draws):
        losses = random.beta(
            0.3, 0.3 / tolerance - 0.3, count
        )  # its mean is the tolerance: never to be taken
        broken += promise.holds(math.fsum(losses), count)
    assert broken <= draws * 0.1


def test_the_sequence_ends_at_the_first_failure() -> None:
    promise = Promise(0.05, 0.95)
    assert promise.last([0, 3, 4, 0], 200) == 1
    assert promise.last([4, 0], 200) is None
    assert promise.last([], 200) is None
