"""What a token is drawn by: known answers, limits, and rows that are no distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.forms import CASES, FORMS, Case
from tokopt.kernels import ops
from tokopt.kernels.uniforms.reference import threefry
from tokopt.runtime.threefry import uniforms

forms = pytest.mark.parametrize("form", FORMS)

KNOWN = (
    ((0, 0), (0, 0), 0x6B200159),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), 0x1CB996FC),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), 0xC4923A9C),
)
"""Threefry-2x32 with 20 rounds: key, block, and the first word of the answer that its authors publish."""


def case(op: str) -> Case:
    return next(case for case in CASES if case.op == op)


def run(form: str, op: str, *tensors: torch.Tensor) -> np.ndarray:
    found = case(op)
    names = [name for name in found.arguments if name not in found.static]
    return FORMS[form](found, {**dict(zip(names, tensors, strict=True)), **found.static})[0]


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def words(first: int, second: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(first), torch.tensor(second)


def floats(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(("key", "block", "answer"), KNOWN)
def test_known_answers(key: tuple[int, int], block: tuple[int, int], answer: int) -> None:
    assert int(threefry(words(*key), words(*block))) == answer


@pytest.mark.parametrize("form", [*FORMS, "numpy"])
@pytest.mark.parametrize(("key", "block", "answer"), KNOWN[:1] + KNOWN[2:])
def test_a_seed_a_stream_and_a_counter_are_the_key_and_the_block(
    form: str, key: tuple[int, int], block: tuple[int, int], answer: int
) -> None:
    """The seed's upper word is the upper one of the block, as far as a seed is not negative."""
    upper = block[1] & 0x7FFFFFFF
    seed, stream, counter = integers(upper << 32 | key[0]), integers(key[1]), integers(block[0])
    if form == "numpy":
        got = uniforms(seed.numpy(), stream.numpy(), counter.numpy(), 5)
    else:
        got = run(form, "uniforms", seed, stream, counter)
    want = threefry(words(*key), words(block[0], upper))
    assert got.dtype == np.float32
    assert got[0, 0] == (int(want) >> 8) / 2**24
    if upper == block[1]:
        assert int(want) == answer


@settings(max_examples=50)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**40))
def test_the_host_draws_the_numbers_of_the_op(seed: int, stream: int, counter: int) -> None:
    want = ops.uniforms(integers(seed), integers(stream), integers(counter), 5).numpy()
    got = uniforms(np.array([seed]), np.array([stream]), np.array([counter]), 5)
    np.testing.assert_array_equal(got, want)


def test_uniforms_are_uniform() -> None:
    """65,536 numbers in 64 bins, and neighbours in 8 x 8, by their chi-square statistics."""
    numbers = ops.uniforms(integers(7), integers(0), integers(0), 65536)[0].numpy()
    for bins in (numbers * 64, 8 * np.floor(numbers[::2] * 8) + numbers[1::2] * 8):
        found = np.bincount(bins.astype(int), minlength=64)
        expected = len(bins) / 64
        assert ((found - expected) ** 2 / expected).sum() < 120  # 63 degrees of freedom: p = 2e-5


@forms
def test_without_truncation_it_is_the_softmax(form: str) -> None:
    logits = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)) * 5
    logits[0, 0, :7] = -torch.inf
    got = run(form, "truncated_softmax", logits, floats(1, 1), integers(0, 0), floats(1, 1), floats(0, 0))
    np.testing.assert_allclose(got, logits.double().softmax(-1).numpy(), rtol=1e-5, atol=1e-7)
    assert (got[0, 0, :7] == 0).all()


@forms
def test_temperature_zero_takes_the_first_of_the_likeliest(form: str) -> None:
    logits = floats(1, 3, 3, -2).reshape(1, 1, 4)
    got = run(form, "truncated_softmax", logits, floats(0), integers(2), floats(0.5), floats(0.1))
    assert got.tolist() == [[[0, 1, 0, 0]]]


@forms
@pytest.mark.parametrize("bad", [[1, float("nan"), 0], [1, float("inf"), 0], [-float("inf")] * 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_no_distribution_draws_nothing(form: str, bad: list[float], temperature: float) -> None:
    """Its row is NaN and its token -1; the row beside it is not touched."""
    logits = torch.tensor([[bad], [[0.0, 5.0, 0.0]]])
    options = (floats(temperature, 0), integers(0, 0), floats(1, 1), floats(0, 0))
    got = run(form, "truncated_softmax", logits, *options)
    assert np.isnan(got[0]).all()
    assert got[1].tolist() == [[0, 1, 0]]
    tokens = run(form, "draw", torch.from_numpy(got), torch.full((2, 1), 0.5))
    assert tokens.tolist() == [[-1], [1]]


@forms
def test_no_token_of_probability_zero_is_drawn(form: str) -> None:
    """Also by the least and the largest number there is."""
    probabilities = floats(0, 0.25, 0, 0.75, 0).expand(1, 3, 5).contiguous()
    uniform = floats(0, 0.25, 1 - 2**-24).reshape(1, 3)
    assert run(form, "draw", probabilities, uniform).tolist() == [[1, 3, 3]]
