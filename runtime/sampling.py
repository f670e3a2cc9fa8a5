"""Choosing the next token: logits processors and the draw.

A :class:`LogitsProcessor` maps logits to logits; a token it forbids gets ``-inf``. :class:`Sampling` is the
usual chain, in the order that Hugging Face's ``generate`` uses; a processor of one's own goes in front of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokopt.errors import InputError
from tokopt.runtime.numerics import log_softmax

Logits = NDArray[np.float32]
"""[batch, vocabulary]."""

History = Sequence[Sequence[int]]
"""Per row, the ids of its prompt and of what was generated so far."""

TOP_H_TOKENS = 100
"""Top-H looks at no more than this many tokens."""


class LogitsProcessor(Protocol):
    """Anything that changes logits before a token is chosen."""

    def __call__(self, history: History, logits: Logits) -> Logits:
        """The new logits [batch, vocabulary]; ``logits`` may be overwritten."""
        ...


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divide the positive logits of tokens in the history by ``penalty``, multiply the negative ones.

    CTRL (arXiv 1909.05858); 1 changes nothing.
    """

    penalty: float

    def __call__(self, history: History, logits: Logits) -> Logits:
        for row, ids in zip(logits, history, strict=True):
            seen = np.unique(np.asarray(ids, np.int64))
            row[seen] = np.where(row[seen] > 0, row[seen] / self.penalty, row[seen] * self.penalty)
        return logits


@dataclass(frozen=True)
class Temperature:
    """Divide the logits by ``temperature``."""

    temperature: float

    def __call__(self, history: History, logits: Logits) -> Logits:
        return logits / np.float32(self.temperature)


@dataclass(frozen=True)
class TopK:
    """Keep the ``k`` most likely tokens, and those equally likely as the last of them."""

    k: int

    def __call__(self, history: History, logits: Logits) -> Logits:
        k = min(self.k, logits.shape[-1])
        least = np.partition(logits, -k, axis=-1)[:, -k, None]
        return np.where(logits < least, -np.inf, logits)


@dataclass(frozen=True)
class TopP:
    """Keep the fewest most likely tokens whose probabilities sum to ``p`` or more (arXiv 1904.09751)."""

    p: float

    def __call__(self, history: History, logits: Logits) -> Logits:
        order, probability = _descending(logits)
        return _keep(logits, order, np.cumsum(probability, axis=-1) - probability < self.p)


@dataclass(frozen=True)
class MinP:
    """Keep the tokens at least ``p`` times as likely as the most likely one (arXiv 2407.01082)."""

    p: float

    def __call__(self, history: History, logits: Logits) -> Logits:
        least = logits.max(axis=-1, keepdims=True) + np.log(self.p)
        return np.where(logits < least, -np.inf, logits)


@dataclass(frozen=True)
class Typical:
    """Keep the fewest tokens with the lowest ``|-log p - H|`` whose probabilities sum to ``mass`` or more.

    Locally typical sampling (arXiv 2202.00666).
    """

    mass: float

    def __call__(self, history: History, logits: Logits) -> Logits:
        probability = softmax(logits)
        with np.errstate(divide="ignore"):
            surprise = -np.log(probability)
        likely = probability > 0  # 0 log 0 is 0
        entropy = np.sum(np.where(likely, probability, 0) * np.where(likely, surprise, 0), -1, keepdims=True)
        order = np.argsort(np.abs(surprise - entropy), axis=-1, kind="stable")
        sorted_ = np.take_along_axis(probability, order, axis=-1)
        return _keep(logits, order, np.cumsum(sorted_, axis=-1) - sorted_ < self.mass)


@dataclass(frozen=True)
class TopH:
    """Keep the longest prefix of the likeliest tokens that holds at most ``alpha`` of their entropy terms.

    Top-H (arXiv 2509.02510): over the 100 most likely tokens, the partial sum of ``-p log p`` stays at or
    below ``alpha`` times the whole sum; one token is always kept.
    """

    alpha: float

    def __call__(self, history: History, logits: Logits) -> Logits:
        order, probability = _descending(logits)
        p = probability[:, :TOP_H_TOKENS]
        term = np.where(p > 0, -p * np.log(np.maximum(p, np.finfo(p.dtype).tiny)), 0)
        so_far = np.cumsum(term, axis=-1)
        inside = so_far <= self.alpha * so_far[:, -1:]
        keep = np.zeros(logits.shape, bool)
        keep[:, : p.shape[-1]] = np.logical_and.accumulate(inside, axis=-1)
        keep[:, 0] = True
        return _keep(logits, order, keep)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default is greedy.

    ``temperature`` 0 takes the most likely token. Above 0 it draws, after ``top_k`` (0: off), ``top_p`` (1),
    ``min_p`` (0), ``typical_p`` (1) and ``top_h`` (0). ``repetition_penalty`` (1) applies to both. ``seed``
    makes the draws repeatable: row i of a batch draws from its own stream, whatever the other rows are.

    Raises InputError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_h: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, holds, range_ in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("typical_p", 0 < self.typical_p <= 1, "above 0 and at most 1"),
            ("top_h", 0 <= self.top_h <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not holds:
                raise InputError(f"{name} is {getattr(self, name)}, it must be {range_}")

    def processors(self) -> Iterator[LogitsProcessor]:
        """The processors that do something, in order."""
        if self.repetition_penalty != 1:
            yield RepetitionPenalty(self.repetition_penalty)
        if not self.temperature:
            return
        if self.temperature != 1:
            yield Temperature(self.temperature)
        if self.top_k:
            yield TopK(self.top_k)
        if self.top_p < 1:
            yield TopP(self.top_p)
        if self.min_p:
            yield MinP(self.min_p)
        if self.typical_p < 1:
            yield Typical(self.typical_p)
        if self.top_h:
            yield TopH(self.top_h)

    def streams(self, batch: int) -> list[np.random.Generator]:
        """One source of random numbers per row."""
        return [np.random.default_rng(None if self.seed is None else (self.seed, i)) for i in range(batch)]


def choose(logits: Logits, temperature: float, streams: Sequence[np.random.Generator]) -> NDArray[np.int64]:
    """The next token of every row [batch]: the likeliest at temperature 0, else drawn from softmax(logits)."""
    if not temperature:
        return logits.argmax(axis=-1)
    # Gumbel-max: argmax(log p + noise) is distributed as p, and a token of probability 0 is never drawn.
    noise: list[NDArray[np.float64]] = [stream.gumbel(size=logits.shape[-1]) for stream in streams]
    return (logits + np.stack(noise)).argmax(axis=-1)


def softmax(logits: Logits) -> NDArray[np.float64]:
    """Probabilities in float64."""
    weight = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)


def _descending(logits: Logits) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Token ids from likeliest to least likely, ties by lowest id, and their probabilities."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    return order, np.take_along_axis(softmax(logits), order, axis=-1)


def _keep(logits: Logits, order: NDArray[np.int64], keep: NDArray[np.bool_]) -> Logits:
    """Logits with ``-inf`` where ``keep``, given in ``order``, is false."""
    mask = np.empty_like(keep)
    np.put_along_axis(mask, order, keep, axis=-1)
    return np.where(mask, logits, -np.inf)


def log_probabilities(logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """Log-probability of each token [tokens] float64 under its row of ``logits`` [tokens, vocabulary]."""
    return log_softmax(logits)[np.arange(len(tokens)), tokens]
