"""NMSE: zero for equal arrays, scale-free, infinite where the comparison makes no sense."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokopt.runtime.numerics import check_output, cosines, log_softmax, nmse, ratio, squares

RNG = np.random.default_rng(0)


@given(st.floats(1e-3, 1e3), st.floats(1e-6, 1.0))
def test_relative_error_squared_whatever_the_scale(scale: float, error: float) -> None:
    x = RNG.standard_normal(50) * scale
    assert nmse(x, x * (1 + error)) == pytest.approx(error**2, rel=1e-6)


def test_equal_arrays_with_equal_infinities_and_nan_differ_by_nothing() -> None:
    x = np.array([1.0, -np.inf, np.nan], dtype=np.float32)
    assert nmse(x, x.copy()) == 0.0


@pytest.mark.parametrize(
    "other",
    [
        np.ones((1, 3), np.float32),
        np.ones(3, np.float64),
        np.array([1, np.nan, 1], np.float32),
        np.array([1, 1, np.inf], np.float32),
    ],
)
def test_incomparable_is_infinite(other: np.ndarray) -> None:
    assert nmse(np.ones(3, np.float32), other) == np.inf
    assert not check_output("x", np.ones(3, np.float32), other).ok


def test_nonzero_where_zero_is_expected_is_far_off() -> None:
    assert not check_output("x", np.zeros(3, np.float32), np.full(3, 1e-6, np.float32)).ok


def test_integers_must_be_equal_and_floats_close() -> None:
    whole = np.arange(5)
    assert check_output("x", whole, whole).ok and not check_output("x", whole, whole + (whole == 4)).ok
    real = RNG.standard_normal(100).astype(np.float32)
    assert check_output("x", real, real * np.float32(1 + 1e-6)).ok
    assert not check_output("x", real, real * np.float32(1 + 1e-3)).ok
    assert check_output("x", real, real * np.float32(1 + 1e-3), limit=1e-5).ok


def test_parts_add_up_to_the_whole() -> None:
    x, y = RNG.standard_normal((2, 6, 5))
    error, energy = map(sum, zip(*(squares(*rows) for rows in zip(x, y, strict=True)), strict=True))
    assert ratio(error, energy) == pytest.approx(nmse(x, y))


def test_cosine_ignores_scale_and_a_zero_vector_is_like_none() -> None:
    x = RNG.standard_normal((7, 12)).astype(np.float32)
    np.testing.assert_allclose(cosines(3 * x, x), 1.0, rtol=1e-6)
    np.testing.assert_allclose(cosines(-x, x), -1.0, rtol=1e-6)
    np.testing.assert_array_equal(cosines(0 * x, x), 0.0)


def test_log_probabilities_ignore_a_shift_and_sum_to_one() -> None:
    logits = RNG.standard_normal((3, 9))
    logits[0, 4] = -np.inf
    found = log_softmax(logits)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1.0)
    np.testing.assert_allclose(log_softmax(logits + 1e4), found, atol=1e-9)
    assert found[0, 4] == -np.inf
