"""What a pipeline costs: nothing for the same model, and by the formulas for another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import tokopt
from tests.matrix import language
from tokopt.analysis.samples import tensors_of
from tokopt.errors import InputError
from tokopt.ir.bundle import Bundle
from tokopt.measure.fidelity import Features, NextTokens, fidelity


class Scaled(nn.Module):
    """x [batch, channels], its second channel turned by ``sign``."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = nn.Parameter(torch.tensor([1.0, sign]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sign


def captured(sign: float) -> Bundle:
    return tokopt.capture(Scaled(sign), (torch.ones(3, 2),))


def test_features() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    same = fidelity(captured(1), captured(1), [x])
    assert isinstance(same, Features) and same.nmse == 0 and same.worst == pytest.approx(1, abs=1e-12)
    found = fidelity(captured(1), captured(-1), [x])
    assert isinstance(found, Features)
    assert (found.cosine, found.worst, found.nmse) == pytest.approx((0.5, 0.0, 4 / 3))


def test_next_tokens() -> None:
    given = language.bundle("llama")
    texts = [language.prompt(20), language.prompt(9, seed=1)]
    same = fidelity(given, given, texts)
    assert isinstance(same, NextTokens) and (same.kl, same.top1) == (0, 1) and same.before == same.after
    rough = fidelity(given, tokopt.optimize(given, "rtn{bits=2 group=16}"), texts)
    assert (
        isinstance(rough, NextTokens) and rough.kl > 0.001 and rough.top1 < 1 and rough.before == same.before
    )
    nats = []
    for text in texts:
        logits = given(*next(tensors_of(given, text)).values())[0][0].double().log_softmax(-1)
        nats += [-float(logits[i, token]) for i, token in enumerate(text[1:])]
    assert same.before == pytest.approx(math.exp(sum(nats) / len(nats)))


def test_no_samples() -> None:
    with pytest.raises(InputError, match="no sample to compare on"):
        fidelity(captured(1), captured(1), [])


class Added(nn.Module):
    """The sum of two inputs [batch, 2]."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_what_says_nothing_of_two_models_is_refused() -> None:
    """Each gave a number: of the names of a mapping, of a row that stood for all, or of what is none."""
    speaks, x = language.bundle("llama"), torch.ones(2, 2)
    rows = {"x": {0: "batch"}, "y": {0: "batch"}}
    added = tokopt.capture(Added(), (x, x), dynamic=rows)
    for given, samples, reason in (
        (speaks, {"input_ids": [1, 2, 3]}, "samples is .*, it must be a list of inputs"),
        (speaks, [[1], [2]], "every sample is of one token"),
        (added, [(x, x[:1])], "'y' has the size 1 along 'batch', and 'x' has 2; give them one size"),
        (added, [(x, x * math.nan)], "gives NaN for a sample"),
    ):
        with pytest.raises(InputError, match=reason):
            fidelity(given, given, samples)
