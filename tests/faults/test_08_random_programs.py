"""A model that drew random numbers passed the parity check, since no two calls of the program itself were closer.

The law: what is captured is a function of its inputs. A model that draws random numbers which something reads, that
changes its own buffers, or that gives other values when it is called again is refused at capture; and no program is so
far from its own float64 values that any other form of it passes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokopt
from tests.zoo.decoders import CONTEXT, VOCABULARY, HandRotary
from tokopt.errors import CaptureError
from tokopt.frontend.language import capture_lm
from tokopt.lower.parity.precision import rounds_alike
from tokopt.runtime import Generation

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    """Calls a function of itself and its input; it has a linear layer and a buffer."""

    count: Tensor

    def __init__(self, function: Callable[[Calls, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.linear, self.calls = function, nn.Linear(8, 8), 0
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def attention(_: Calls, x: Tensor) -> Tensor:
    heads = x[:, None]
    return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.1)[:, 0]


def noise_in_place(_: Calls, x: Tensor) -> Tensor:
    noise = torch.empty_like(x)
    noise.normal_()
    return x + noise


def branch(_: Calls, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: x + torch.rand_like(x), lambda x: x * 1, (x,))


@pytest.mark.parametrize(
    "function",
    [
        lambda model, x: F.dropout(model.linear(x), 0.1),
        attention,
        noise_in_place,
        branch,
        lambda _, x: F.rrelu(x, training=True),
        lambda _, x: torch.multinomial(x.softmax(-1).flatten(0, 1), 1),
    ],
    ids=["dropout", "attention", "in place", "branch", "rrelu", "multinomial"],
)
def test_random_numbers_are_refused(function: Callable[[Calls, Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match=r"draws random numbers: .*turn them off"):
        tokopt.capture(Calls(function), (X,))


def test_an_exported_program_and_a_recurrent_layer_in_training_mode_are_refused() -> None:
    trained = torch.export.export(nn.Sequential(nn.Dropout(0.3)).train(), (X,))
    with pytest.raises(CaptureError, match="draws random numbers: dropout"):
        tokopt.capture(trained)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm.train()(x)[0]

    with pytest.raises(CaptureError, match="draws random numbers: lstm"):
        tokopt.capture(Recurrent(), (X,))


def test_a_language_model_is_refused() -> None:
    class Dropping(HandRotary):
        def forward(self, *given: Any) -> Tensor:
            return F.dropout(super().forward(*given), 0.1)

    model = Dropping(hidden=32, heads=2, layers=1).eval()
    with pytest.raises(CaptureError, match="Dropping draws random numbers"):
        capture_lm(model, generation=Generation(CONTEXT, VOCABULARY))


@pytest.mark.parametrize(
    "function",
    [
        lambda model, x: F.dropout(model.linear(x), 0.1, training=model.training),
        lambda model, x: F.dropout(model.linear(x), 0.0),
        lambda model, x: (torch.rand([]), model.linear(x))[1],  # layer drop draws before it looks at the mode
    ],
    ids=["evaluation", "share of 0", "unread"],
)
def test_what_is_off_or_unread_is_captured(function: Callable[[Calls, Tensor], Tensor]) -> None:
    model = Calls(function)
    (got,) = tokopt.capture(model, (X,))(X)
    torch.testing.assert_close(got, model.eval()(X), rtol=0, atol=0)


def count_in_place(model: Calls, x: Tensor) -> Tensor:
    model.count += 1
    return x + model.count


def count_anew(model: Calls, x: Tensor) -> Tensor:
    model.count = model.count + 1
    return x + model.count


@pytest.mark.parametrize("function", [count_in_place, count_anew])
def test_a_model_that_changes_its_buffers_is_refused(function: Callable[[Calls, Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match="changes its buffer 'count' whenever it is called"):
        tokopt.capture(Calls(function), (X,))


def test_a_table_that_the_first_call_makes_is_none_of_these() -> None:
    def lazy(model: Calls, x: Tensor) -> Tensor:
        if model.count.numel() < x.shape[1]:
            model.register_buffer("count", torch.arange(float(x.shape[1])))
        return x + model.count[:, None]

    torch.testing.assert_close(tokopt.capture(Calls(lazy), (X,))(X)[0], X + torch.arange(5.0)[:, None])


def count_in_python(model: Calls, x: Tensor) -> Tensor:
    model.calls += 1
    return x * model.calls


@pytest.mark.parametrize("function", [count_in_python, lambda _, x: x * random.random()])
def test_what_python_changes_between_calls_is_refused(function: Callable[[Calls, Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match="must be a function of its inputs alone"):
        tokopt.capture(Calls(function), (X,))


def test_an_input_that_the_model_overwrites_stays_what_it_is() -> None:
    """The caller's tensor, the example, and what a bundle is called with."""
    model, x = Calls(lambda model, x: model.linear(x.add_(1))), X.clone()
    bundle = tokopt.capture(model, (x,))
    (got,) = bundle(x)
    torch.testing.assert_close(x, X, rtol=0, atol=0)
    torch.testing.assert_close(got, model.linear(X + 1))


def test_a_program_that_is_nowhere_near_itself_does_not_excuse_another_form() -> None:
    """All digits cancel: the program's own error is as large as its values, and so may be that of anything else."""

    class Lost(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 1e9) - 1e9

    program = tokopt.capture(Lost(), (X,)).main
    assert not rounds_alike(program, (X,), program(X), [np.zeros_like(X.numpy())])
