"""Passes of different kinds work in any order: the result is that of the canonical order, or the pipeline is refused.

The canonical order is token reductions, then weights and products, then the cache; passes of one kind keep the order in
which they are written. Every pass equals its naive reference in the matrix, so a pipeline is what its passes are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import tokopt
from tests.matrix import language
from tests.zoo.blocks import Encoder, FunctionalAttention, PreNormBlock
from tests.zoo.decoders import CONTEXT, VOCABULARY, HandRotary
from tests.zoo.entries import randomize
from tokopt.errors import TokoptError
from tokopt.frontend.language import capture_lm
from tokopt.ir.bundle import Bundle
from tokopt.runtime import Generation
from tokopt.runtime.numerics import nmse

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))

REDUCTIONS = ("tome{r=2}", "tome{r=4}", "divprune{r=1}", "evit{r=2}", "kcenter{keep=0.8}")
WEIGHTS = ("rtn{group=16}", "rtn{bits=8 group=32}", "int8", "keep_grid")
"""Without ``cast``, which makes a matching compare keys in half precision or in float32, as the order says."""

EVICTIONS = (
    "h2o{budget=12 sinks=2 recent=4 every=4}",
    "streaming{budget=12 sinks=2 recent=4 every=4 rerotate=true}",
    "knorm{budget=[20,13] sinks=2 recent=4 every=4}",
)
CACHES = ("kivi{group=4 residual=6 every=4}",)


@cache
def encoder() -> Bundle:
    """Two blocks on 17 tokens."""
    blocks = [PreNormBlock(32, 48, FunctionalAttention(32, 2)) for _ in range(2)]
    return tokopt.capture(randomize(Encoder(16, 4, 32, blocks)), (IMAGES,))


@cache
def decoder() -> Bundle:
    """Two layers with rotary embeddings."""
    torch.manual_seed(0)
    model: nn.Module = HandRotary(hidden=32, heads=2, layers=2).eval().requires_grad_(False)
    return capture_lm(model, generation=Generation(CONTEXT, VOCABULARY))


@cache
def made(kind: str, passes: tuple[str, ...], strict: bool) -> Bundle | str:
    """The optimised bundle, or the sentence with which the pipeline is refused."""
    bundle, samples = (encoder(), [IMAGES]) if kind == "encoder" else (decoder(), [language.prompt(24)])
    try:
        return tokopt.optimize(bundle, ",".join(passes), calibration=samples, strict=strict)
    except TokoptError as error:
        return str(error)


@st.composite
def shuffles(draw: Any, *kinds: st.SearchStrategy[list[str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Passes of several kinds in a random order that keeps that of each kind, and in the canonical one."""
    chosen = [draw(kind) for kind in kinds]
    turns = draw(st.permutations([kind for kind, passes in enumerate(chosen) for _ in passes]))
    queues = [iter(passes) for passes in chosen]
    return tuple(next(queues[kind]) for kind in turns), tuple(one for passes in chosen for one in passes)


def some(passes: Sequence[str], most: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(passes), max_size=most, unique=True)


def assert_sentence(refused: str) -> None:
    assert refused and "\n" not in refused and "Error:" not in refused, refused


def assert_equal(got: Bundle, wanted: Bundle) -> None:
    """Every program computes the same on the other's example."""
    assert got.states == wanted.states
    assert (got.schedule, list(got.programs)) == (wanted.schedule, list(wanted.programs))
    for one, other in zip(got.programs.values(), wanted.programs.values(), strict=True):
        assert (one.inputs, one.outputs, one.aliases) == (other.inputs, other.outputs, other.aliases)
        for ours, theirs in zip(one(*other.example), other(*other.example), strict=True):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            assert nmse(theirs.double().numpy(), ours.double().numpy()) < 1e-9


def check(kind: str, passes: tuple[str, ...], canonical: tuple[str, ...]) -> None:
    """The pipeline does what its canonical order does, or both are refused."""
    got = made(kind, passes, True)
    if isinstance(got, str):
        assert_sentence(got)
        assert isinstance(made(kind, canonical, True), str), f"{passes}: {got}"
        return
    wanted = made(kind, canonical, True)
    assert isinstance(wanted, Bundle), wanted
    assert_equal(got, wanted)


@settings(max_examples=5)
@given(shuffles(some(REDUCTIONS, 2), some(WEIGHTS, 2)))
@example(
    (("tome{r=4}", "rtn{group=16}", "tome{r=2}"), ("tome{r=4}", "tome{r=2}", "rtn{group=16}")),
)
@example((("tome{r=4}", "int8", "divprune{r=1}"), ("tome{r=4}", "divprune{r=1}", "int8")))
def test_reductions_and_weights(pipelines: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    check("encoder", *pipelines)


@settings(max_examples=8)
@given(shuffles(some(WEIGHTS, 2), some((*EVICTIONS, *CACHES), 2)))
def test_weights_and_caches(pipelines: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    check("decoder", *pipelines)


def test_an_interrupted_reduction_is_that_of_its_canonical_order() -> None:
    """The case is not refused, so that the law above says something of it."""
    got = made("encoder", ("tome{r=4}", "rtn{group=16}", "tome{r=2}"), True)
    wanted = made("encoder", ("tome{r=4}", "tome{r=2}", "rtn{group=16}"), True)
    assert isinstance(got, Bundle) and isinstance(wanted, Bundle)
    assert_equal(got, wanted)


@pytest.mark.parametrize(
    ("kind", "passes", "reason"),
    [
        (
            "encoder",
            "tome{r=2},int8{activations=static},tome{r=2}",
            "give all token reductions in one pipeline, ahead of",
        ),
        ("decoder", "kivi{group=4 residual=6 every=4},h2o{budget=12 recent=4 sinks=2}", "evicted already"),
        ("decoder", "int8_kv,h2o{budget=12 recent=4 sinks=2}", "put int8_kv last"),
    ],
)
def test_an_order_that_cannot_be_is_refused_with_the_one_that_can(
    kind: str, passes: str, reason: str
) -> None:
    refused = made(kind, tuple(passes.split(",")), True)
    assert isinstance(refused, str) and reason in refused
    assert_sentence(refused)


MEASURING = ("gptq{group=16}", "awq{group=16}", "smoothquant", "int8{activations=static}", "cast")
"""What they do depends on the numbers that they meet, and so on what came before."""


@settings(max_examples=5)
@given(shuffles(some(REDUCTIONS, 1), some(MEASURING, 2)))
@example((("gptq{group=16}", "tome{r=4}", "cast"), ("tome{r=4}", "gptq{group=16}", "cast")))
@example((("cast", "divprune{r=1}"), ("divprune{r=1}", "cast")))
def test_orders_of_passes_that_measure(pipelines: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    """Every order does as much at as many places, and comes out near the canonical one; or both are refused."""
    got, wanted = (made("encoder", passes, True) for passes in pipelines)
    if isinstance(got, str) or isinstance(wanted, str):
        assert_sentence(str(got))
        assert_sentence(str(wanted))
        return
    matches = [{step.text: step.matches for step in bundle.history} for bundle in (got, wanted)]
    assert matches[0] == matches[1]
    for ours, theirs in zip(got(IMAGES), wanted(IMAGES), strict=True):
        assert ours.shape == theirs.shape and nmse(theirs.double().numpy(), ours.double().numpy()) < 0.2
