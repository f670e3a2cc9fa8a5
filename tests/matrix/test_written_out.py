"""Eviction where attention is written out, since no fused one caps logits or has sinks beside them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tokopt
from tests.matrix.eviction import NaiveDecoder, Vector, softmax
from tests.matrix.language import prompt
from tests.matrix.test_eviction import BUDGET, EVERY, RECENT, SINKS, Driver, spelled
from tests.zoo.decoders import HandWritten
from tokopt.errors import PassRefused
from tokopt.frontend.decoder import Cache
from tokopt.frontend.language import capture_lm
from tokopt.ir.bundle import Bundle
from tokopt.runtime import LanguageModel, load

HEADS, SHARING, CAP = 4, 2, 2.0
"""Heads of queries, how many share a head of keys, and the largest logit."""


class WrittenOut(HandWritten):
    """Capped logits (Gemma 2), a sink per head beside them (gpt-oss), and keys that heads share."""

    def __init__(self) -> None:
        super().__init__(hidden=48, heads=HEADS)
        self.sinks = nn.Parameter(torch.randn(2, HEADS))

    def attended(
        self, layer: int, queries: Tensor, new: tuple[Tensor, Tensor], mask: Tensor, cache: Cache
    ) -> Tensor:
        keys, values = (self.repeated(x) for x in cache.update(layer, *(x[:, ::SHARING] for x in new)))
        logits = queries @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5
        return self.weights(layer, logits, mask) @ values

    def weights(self, layer: int, logits: Tensor, mask: Tensor) -> Tensor:
        logits = CAP * torch.tanh(logits / CAP) + torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        sinks = self.sinks[layer].reshape(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], -1)
        both = torch.cat([logits, sinks], dim=-1)
        return (both - both.max(dim=-1, keepdim=True).values).softmax(-1)[..., :-1]

    def repeated(self, x: Tensor) -> Tensor:
        batch, heads, slots, channels = x.shape
        return (
            x[:, :, None].expand(batch, heads, SHARING, slots, channels).reshape(batch, -1, slots, channels)
        )


class Filled(WrittenOut):
    """Capped logits alone; what is hidden is put in their place, and heads have keys of their own."""

    def attended(
        self, layer: int, queries: Tensor, new: tuple[Tensor, Tensor], mask: Tensor, cache: Cache
    ) -> Tensor:
        shared = (self.repeated(x[:, ::SHARING]) for x in new)
        keys, values = cache.update(layer, *shared)
        logits = CAP * torch.tanh(queries @ keys.mT * queries.shape[-1] ** -0.5 / CAP)
        return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ values


class Gated(WrittenOut):
    """Sinks as Granite has them: what a softmax beside them leaves of the sum, by its logarithm."""

    def attended(
        self, layer: int, queries: Tensor, new: tuple[Tensor, Tensor], mask: Tensor, cache: Cache
    ) -> Tensor:
        keys, values = (self.repeated(x) for x in cache.update(layer, *(x[:, ::SHARING] for x in new)))
        logits = CAP * torch.tanh(queries @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5 / CAP)
        logits = logits + torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        share = torch.sigmoid(logits.logsumexp(-1) - self.sinks[layer].view(1, -1, 1))
        return logits.softmax(-1) @ values * share[..., None]


@dataclass
class NaiveWrittenOut(NaiveDecoder):
    """One token at a time. Heads that share keys hold the same ones, and so keep the same."""

    def _attend(self, layer: int, h: int, position: int, q: Vector, k: Vector, v: Vector) -> Vector:
        if h % SHARING == 0:
            self.shared = k, v
        return super()._attend(layer, h, position, q, *self.shared)

    def _weights(self, layer: int, h: int, logits: Vector) -> Vector:
        assert isinstance(self.model, WrittenOut)
        capped = CAP * np.tanh(logits / CAP)
        if isinstance(self.model, Filled):
            return softmax(capped)
        return softmax(np.append(capped, self.model.sinks[layer, h].item()))[:-1]


@cache
def captured(kind: type[WrittenOut] = WrittenOut) -> Bundle:
    return capture_lm(model(kind), generation=kind.generation)


@cache
def model(kind: type[WrittenOut] = WrittenOut) -> WrittenOut:
    torch.manual_seed(0)
    made = kind().eval().requires_grad_(False)
    for weight in made.parameters():
        weight.mul_(2)  # so that eviction changes the text
    return made


def naive(method: str, kind: type[WrittenOut] = WrittenOut) -> NaiveDecoder:
    *wrappers, name = method.split()
    return NaiveWrittenOut(model(kind), name, BUDGET, SINKS, RECENT, EVERY, wrappers=tuple(wrappers))


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("knorm", WrittenOut),
        ("keydiff", Filled),
        ("streaming", Gated),
        ("adakv knorm", WrittenOut),
        ("adakv keydiff", Filled),
        ("chunk keydiff", WrittenOut),
    ],
)
def test_keeps_and_computes_what_the_formula_says(method: str, kind: type[WrittenOut]) -> None:
    """Keys after every eviction of a text that the naive decoder writes, and its tokens; also with unequal layers."""
    ids, count = prompt(20), 1 + 4 * EVERY
    reference = naive(method, kind)
    text = reference.generate(ids, count)
    driver = Driver(tokopt.optimize(captured(kind), spelled(method), strict=True), 1)
    logits = driver.follow([ids], [text[:-1]], EVERY)
    assert logits[:, 0].argmax(-1).tolist() == text
    for layer, heads in enumerate(reference.heads):
        for h, head in enumerate(heads if kind is Filled else heads[::SHARING]):
            wanted = np.array([entry.key for entry in head.entries])
            np.testing.assert_allclose(driver.held("key", layer, h).numpy(), wanted, atol=1e-4)


def test_generates_what_the_formula_generates(tmp_path: Path) -> None:
    """Out of ONNX Runtime."""
    tokopt.export(tokopt.optimize(captured(), spelled("knorm")), tmp_path / "evicting", target="onnx")
    made = load(tmp_path / "evicting", threads=1)
    assert isinstance(made, LanguageModel)
    ids = prompt(20, 3)
    wanted = naive("knorm").generate(ids, 30)
    assert list(made.generate(ids, max_tokens=30).tokens) == wanted != model().greedy(ids, 30)


@pytest.mark.parametrize("method", ["h2o", "tova", "snapkv", "chunk h2o"])
def test_methods_that_read_its_weights_are_refused(method: str) -> None:
    with pytest.raises(
        PassRefused, match=r"layers 0, 1 has capped logits or sinks, whose weights .* take one that"
    ):
        tokopt.optimize(captured(), spelled(method), strict=True)


def test_passes_that_rewrite_the_cache_take_fused_attention_alone() -> None:
    with pytest.raises(PassRefused, match="are read by something else than scaled_dot_product_attention"):
        tokopt.optimize(captured(), "kivi", strict=True)


class Tiled(WrittenOut):
    """Heads of keys in turn, where a mask of their own would be repeated side by side."""

    def repeated(self, x: Tensor) -> Tensor:
        batch, heads, slots, channels = x.shape
        return x[:, None].expand(batch, SHARING, heads, slots, channels).reshape(batch, -1, slots, channels)


class Squared(WrittenOut):
    """Weights that do more than a softmax: a method that renumbers or moves slots does not know them."""

    def weights(self, layer: int, logits: Tensor, mask: Tensor) -> Tensor:
        return super().weights(layer, logits, mask) ** 2


class Doubled(WrittenOut):
    """Keys that are read beside the attention, too."""

    def attended(
        self, layer: int, queries: Tensor, new: tuple[Tensor, Tensor], mask: Tensor, cache: Cache
    ) -> Tensor:
        keys, values = cache.update(layer, *new)
        attended = self.weights(layer, queries @ keys.transpose(2, 3), mask) @ values
        return attended + mask.float() @ keys


@pytest.mark.parametrize("kind", [Tiled, Squared, Doubled])
def test_other_forms_are_refused(kind: type[WrittenOut]) -> None:
    bundle = capture_lm(kind().eval(), generation=kind.generation)
    with pytest.raises(PassRefused, match="the caches of the layers 0, 1 are read by something else"):
        tokopt.optimize(bundle, spelled("knorm"), strict=True)
