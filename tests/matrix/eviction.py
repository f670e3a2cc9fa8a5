"""Eviction written from the papers' formulas, one token at a time in float64, for the hand-written decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.zoo.decoders import HandRotary, HandWritten

Vector = np.ndarray


@dataclass
class Entry:
    """One cached token of one head; ``raw`` is its key before rotation."""

    position: int
    raw: Vector
    key: Vector
    value: Vector
    mass: float = 0.0
    noisy_mass: float = 0.0
    attended: float = 0.0


@dataclass
class Head:
    """What one head holds, oldest first, and every query it made, rotated and raw."""

    entries: list[Entry] = field(default_factory=list)
    queries: list[Vector] = field(default_factory=list)
    raw: list[Vector] = field(default_factory=list)


def softmax(x: Vector) -> Vector:
    e = np.exp(x - x.max())
    return e / e.sum()


def unit(x: Vector) -> Vector:
    return x / np.linalg.norm(x)


def snapkv(head: Head, window: int, kernel: int, pool: Callable = np.mean) -> list[float]:
    keys = np.array([entry.key for entry in head.entries])
    mass = np.zeros(len(keys))
    for behind, query in enumerate(reversed(head.queries[-window:])):
        seen = len(keys) - behind
        mass[:seen] += softmax(keys[:seen] @ query / math.sqrt(len(query)))
    mass[max(len(keys) - window, 0) :] = 0
    padded = np.pad(mass, kernel // 2)
    return [float(pool(padded[i : i + kernel])) for i in range(len(mass))]


def keydiff(head: Head) -> list[float]:
    anchor = np.mean([unit(entry.key) for entry in head.entries], axis=0)
    return [-float(unit(entry.key) @ unit(anchor)) for entry in head.entries]


def turned(x: Vector, position: int) -> Vector:
    """The rotation of the hand-written rotary decoder, in complex numbers."""
    pairs = len(x) // 2
    turned = (x[::2] + 1j * x[1::2]) * np.exp(1j * position * 100.0 ** (-np.arange(pairs) / pairs))
    return np.stack([turned.real, turned.imag], axis=-1).reshape(-1)


def expected_attention(head: Head, sinks: int, future: int) -> list[float]:
    queries = np.array(head.raw[sinks:])
    size, last = queries.shape[1], head.entries[-1].position
    rotation = np.mean([[turned(e, last + 1 + j) for e in np.eye(size)] for j in range(future)], axis=0).T
    mean = rotation @ queries.mean(axis=0)
    spread = rotation @ np.cov(queries.T, bias=True) @ rotation.T
    keys = np.array([entry.key for entry in head.entries])
    exponent = keys @ mean / math.sqrt(size) + np.einsum("ki,ij,kj->k", keys, spread, keys) / (2 * size)
    lengths = np.linalg.norm([entry.value for entry in head.entries], axis=1)
    return [0.0] * sinks + list(softmax(exponent[sinks:]) * lengths[sinks:])


SCORES: Mapping[str, Callable[[Head], list[float]]] = {
    "streaming": lambda head: [entry.position for entry in head.entries],
    "h2o": lambda head: [entry.mass for entry in head.entries],
    "keyformer": lambda head: [entry.noisy_mass for entry in head.entries],
    "snapkv": lambda head: snapkv(head, window=3, kernel=5),
    "snapkv kernel=7 pooling=max": lambda head: snapkv(head, window=3, kernel=7, pool=np.max),
    "tova": lambda head: [entry.attended for entry in head.entries],
    "knorm": lambda head: [-float(np.linalg.norm(entry.key)) for entry in head.entries],
    "keydiff": keydiff,
    "expected_attention": lambda head: expected_attention(head, sinks=2, future=8),
}
TOGETHER = ("streaming", "tova")
"""Methods that keep the same tokens in all heads of a layer."""
WRAPPERS = ("chunk", "adakv")
"""Methods that choose by the scores of another, named before it: ``chunk h2o``."""
LENGTH, ALPHA = 5, 0.6
"""The options of the wrappers."""


def gumbel(position: int, slot: int, head: int, seed: int) -> float:
    """The noise of tokopt's Keyformer, in Python's integers."""
    prime = 1_048_573
    value = position * 7919 + 1009 * seed + 1 + head * 104_729 + slot * 15_485_863
    for multiplier in (48_271, 69_621, 16_807):
        value = (value % prime * multiplier) % prime
        value = (value * value + 12_345) % prime
    return -math.log(-math.log((value + 0.5) / prime))


def linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return layer.weight.double() @ x + layer.bias.double()


def normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape, norm.weight.double(), norm.bias.double())


@dataclass
class NaiveDecoder:
    """Greedy decoding of ``model`` in which ``method`` evicts; with ``rerotate`` it renumbers what it keeps.

    ``wrappers`` choose by its scores. A prompt longer than ``chunk`` is evicted from whenever so many tokens were read.
    """

    model: HandWritten
    method: str
    budget: int
    sinks: int
    recent: int
    every: int
    rerotate: bool = False
    chunk: int = 10**9
    wrappers: tuple[str, ...] = ()

    def generate(self, prompt: list[int], count: int) -> list[int]:
        layers = len(self.model.qkv)
        self.heads = [[Head() for _ in range(self.model.heads)] for _ in range(layers)]
        self.generated, self.next = 0, 0
        with torch.no_grad():
            for i, token in enumerate(prompt):
                logits = self._token(token)
                if (i + 1) % self.chunk == 0:
                    self._compact()
            self._compact()
            made: list[int] = []
            while True:
                made.append(int(logits.argmax()))
                if len(made) == count:
                    return made
                self.generated = len(made)
                logits = self._token(made[-1])
                if len(made) % self.every == 0:
                    self._compact()

    def _token(self, token: int) -> torch.Tensor:
        m: Any = self.model
        position, self.next = self.next, self.next + 1
        x = m.embedded(torch.tensor(token), torch.tensor(position)).double()
        for layer, (qkv, out) in enumerate(zip(m.qkv, m.out, strict=True)):
            q, k, v = linear(qkv, normed(m.norm[layer], x)).view(3, m.heads, -1).numpy()
            mixed = [self._attend(layer, h, position, q[h], k[h], v[h]) for h in range(m.heads)]
            self._attended(layer)
            x = x + linear(out, torch.from_numpy(np.concatenate(mixed)))
        return m.head.weight.double() @ normed(m.norm[-1], x)

    def _attend(self, layer: int, h: int, position: int, q: Vector, k: Vector, v: Vector) -> Vector:
        head = self.heads[layer][h]
        head.raw.append(q)
        q = self._turned(q, position)
        head.entries.append(Entry(position, k, self._turned(k, position), v))
        head.queries.append(q)
        logits = np.array([entry.key @ q for entry in head.entries]) / math.sqrt(len(q))
        weights = self._weights(layer, h, logits)
        noise = np.array([gumbel(position, slot, h, 0) for slot in range(len(logits))])
        noisy = softmax((logits + noise) / (1 + 0.01 * self.generated))
        for entry, weight, noised in zip(head.entries, weights, noisy, strict=True):
            entry.mass += float(weight)
            entry.noisy_mass += float(noised)
            entry.attended = float(weight)
        return weights @ np.array([entry.value for entry in head.entries])

    def _weights(self, layer: int, h: int, logits: Vector) -> Vector:
        return softmax(logits)

    def _turned(self, x: Vector, position: int) -> Vector:
        return turned(x, position) if isinstance(self.model, HandRotary) else x

    def _attended(self, layer: int) -> None:
        """TOVA looks at the mean over heads, which hold the same tokens."""
        if self.method == "tova":
            for entries in zip(*(head.entries for head in self.heads[layer]), strict=True):
                mean = sum(entry.attended for entry in entries) / len(entries)
                for entry in entries:
                    entry.attended = mean

    def _compact(self) -> None:
        for heads in self.heads:
            scores = [SCORES[self.method](head) for head in heads]
            if "chunk" in self.wrappers:
                scores = [self._by_chunk(head, score) for head, score in zip(heads, scores, strict=True)]
            budgets = [self.budget] * len(heads)
            if "adakv" in self.wrappers:
                budgets = self._by_head(scores)
            for head, score, budget in zip(heads, scores, budgets, strict=True):
                head.entries = [head.entries[slot] for slot in sorted(self._ranked(score)[:budget])]
                if self.rerotate:
                    self._renumber(head.entries)

    def _renumber(self, entries: list[Entry]) -> None:
        for position, entry in enumerate(entries):
            entry.position, entry.key = position, turned(entry.raw, position)
        self.next = len(entries)

    def _ranked(self, score: list[float]) -> list[int]:
        """Slots, those that are never evicted first, then by score."""
        slots = range(len(score))
        guarded = [s for s in slots if s < self.sinks or s >= len(score) - self.recent]
        others = sorted((s for s in slots if s not in guarded), key=lambda s: -score[s])
        return guarded + others

    def _by_chunk(self, head: Head, score: list[float]) -> list[float]:
        """Minus the part of a token's chunk, as long as it was in the text, that is better than the token."""
        ranked, text = self._ranked(score), head.entries[-1].position + 1
        chunks = [entry.position // LENGTH for entry in head.entries]
        better = [
            [s for s in ranked[: ranked.index(slot)] if chunks[s] == own] for slot, own in enumerate(chunks)
        ]
        sizes = [min(LENGTH, text - own * LENGTH) for own in chunks]
        return [-len(slots) / size for slots, size in zip(better, sizes, strict=True)]

    def _by_head(self, scores: list[list[float]]) -> list[int]:
        """How many tokens each head keeps: its own share, and of the others the best of all heads."""
        own = max(int(ALPHA * self.budget), self.sinks + self.recent)
        others = [(-score[s], h) for h, score in enumerate(scores) for s in self._ranked(score)[own:]]
        best = [h for _, h in sorted(others)[: (self.budget - own) * len(scores)]]
        return [min(own, len(score)) + best.count(h) for h, score in enumerate(scores)]

    def positions(self) -> list[list[list[int]]]:
        """Positions held, by layer and head."""
        return [[[entry.position for entry in head.entries] for head in heads] for heads in self.heads]
