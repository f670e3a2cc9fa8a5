"""Bisection and calls failed on language models, a loaded one counted a layer too many, an order was refused falsely.

The law: what works on an encoder's bundle works on a language model's. Called on tokens, a bundle gives the logits of
the model, before and after every pass; a description counts the model's layers, whatever states a pass adds; and a
reduction after quantization is that of the canonical order, or refused with what is true.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tokopt
from tests.pipeline.test_any_order import IMAGES, assert_equal, encoder
from tests.zoo.decoders import CONTEXT, VOCABULARY, HandRotary
from tokopt.errors import InputError
from tokopt.frontend.language import capture_lm
from tokopt.ir.bundle import Bundle
from tokopt.pipeline.base import Context
from tokopt.pipeline.bisect import bisect
from tokopt.runtime import Generation, load

ARTIFACTS = Path(__file__).parent.parent / "data" / "artifacts" / "format2"
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


class Uncached:
    """Attention to the new tokens alone."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values


@cache
def decoder() -> tuple[HandRotary, Bundle]:
    torch.manual_seed(0)
    model = HandRotary(hidden=32, heads=2, layers=2).eval().requires_grad_(False)
    return model, capture_lm(model, generation=Generation(CONTEXT, VOCABULARY))


@pytest.mark.parametrize("text", ["", "h2o{budget=20 recent=4}", "kivi{group=4 residual=8 every=4}"])
def test_a_call_gives_the_models_logits(text: str) -> None:
    model, bundle = decoder()
    (logits,) = tokopt.optimize(bundle, text)(TOKENS)
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    wanted = model(TOKENS, torch.arange(6).expand(2, -1), causal, Uncached(), torch.arange(6))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [TOKENS[0], TOKENS.float(), TOKENS[:, :0], TOKENS + VOCABULARY, -TOKENS])
def test_what_is_no_text_is_refused(tokens: Tensor) -> None:
    with pytest.raises(
        InputError, match=r"'tokens' (is float32|has shape)|give ids \[batch, tokens\] below 97"
    ):
        decoder()[1](tokens)


def test_bisection_finds_the_pass_that_moves_the_logits() -> None:
    found = bisect(
        decoder()[1], "h2o{budget=20 recent=4},rtn{bits=2 group=16},smoothquant",
        tolerance=1e-3, context=Context(calibration=[TOKENS]),
    )  # fmt: skip
    assert [step.worst > 1e-3 for step in found.steps] == [False, True, True]
    assert found.culprit is found.steps[1]
    assert bisect(decoder()[1], "smoothquant", context=Context(calibration=[TOKENS])).culprit is None


@pytest.mark.parametrize("name", ["mistral-h2o", "h2o-int8", "streaming-kivi", "rerotate"])
def test_a_description_counts_the_models_layers(name: str) -> None:
    assert repr(load(ARTIFACTS / name)) == f"<LanguageModel {name}: 2 layers>"


def test_a_reduction_after_quantization_is_that_before() -> None:
    made, wanted = (
        tokopt.optimize(encoder(), text, strict=True)
        for text in ("tome{r=4},rtn{group=16},tome{r=2}", "tome{r=4},tome{r=2},rtn{group=16}")
    )
    assert_equal(made, wanted)
    assert [step.matches for step in made.history] == [2, 8, 2]
    assert made(IMAGES)[0].shape == (3, 32)
