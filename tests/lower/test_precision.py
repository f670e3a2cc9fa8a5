"""A program that loses digits by itself asks no more of another form; a well-conditioned one asks for all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tokopt
from tests.matrix.language import bundle
from tokopt.lower.parity.precision import in_float64, rounds_alike
from tokopt.runtime.numerics import LIMITS, nmse


class Cancelling(nn.Module):
    """Adds a huge number and takes it away again."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 1.1 + 1e4) - 1e4


def test_float64_is_float64_all_the_way() -> None:
    """Through casts to float32 and custom ops, as a decoder has them."""
    step = bundle("llama").main
    exact, rounded = in_float64(step, step.example)[0], step(*step.example)[0]
    assert exact.dtype == torch.float64
    assert 0 < nmse(exact.numpy(), rounded.double().numpy()) < 1e-10


def test_cancellation_is_no_fault_but_another_program_is() -> None:
    """Summing in another order is as far from the truth as the program; leaving out a factor is not."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    program = tokopt.capture(Cancelling(), (x,)).main
    expected = program(x)
    other = ((x + 1e4 / 1.1) * 1.1 - 1e4).numpy()
    assert nmse(expected[0].numpy(), other) > LIMITS["float32"]
    assert rounds_alike(program, (x,), expected, [other])
    assert not rounds_alike(program, (x,), expected, [(x * 1.2).numpy()])


def test_only_outputs_that_are_off_need_the_excuse() -> None:
    """One that is exact allows nothing, however small; another's cancellation is judged without it."""

    class Both(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return Cancelling()(x), x * 2

    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    program = tokopt.capture(Both(), (x,)).main
    cancelled, exact = program.outputs
    expected = program(x)
    actual = [((x + 1e4 / 1.1) * 1.1 - 1e4).numpy(), (x * (2 + 1e-6)).numpy()]
    assert rounds_alike(program, (x,), expected, actual, [cancelled.name])
    assert not rounds_alike(program, (x,), expected, actual, [exact.name])
    assert not rounds_alike(program, (x,), expected, actual)


@pytest.mark.parametrize("wrong", [np.nan, 1e-3])
def test_a_small_fault_is_seen_where_nothing_cancels(wrong: float) -> None:
    x = torch.linspace(1, 2, 8)
    program = tokopt.capture(nn.Tanh(), (x,)).main
    expected = program(x)
    assert rounds_alike(program, (x,), expected, [expected[0].numpy()])
    assert not rounds_alike(program, (x,), expected, [expected[0].numpy() + np.float32(wrong)])
