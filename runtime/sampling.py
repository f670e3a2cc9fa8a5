"""Choosing the next token: logits processors and the draw.

A :class:`LogitsProcessor` maps logits to logits; a token it forbids gets ``-inf``. :class:`Sampling` is the
usual chain, in the order that Hugging Face's ``generate`` uses; a processor of one's own goes in front of it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from tokopt.arguments import check_integer, check_kind, check_number, wrong
from tokopt.errors import InputError
from tokopt.runtime.format.signature import DRAWING
from tokopt.runtime.numerics import log_softmax
from tokopt.runtime.threefry import uniforms

Logits = NDArray[np.floating]
"""[batch, vocabulary]."""

History = Sequence[Sequence[int]]
"""Per row, the ids of its prompt and of what was generated so far."""

SEED_BITS = 63
"""Of a seed as many of the lowest bits count, which fit into an int64."""

TOP_H_TOKENS = 100
"""Top-H looks at no more than this many tokens."""


class LogitsProcessor(Protocol):
    """Anything that changes logits before a token is chosen."""

    def __call__(self, history: History, logits: Logits) -> Logits:
        """The new logits [batch, vocabulary]; ``logits`` may be overwritten."""
        ...


class TokenIds(list[int]):
    """The token ids of one text, to which further ones may be appended."""

    def __init__(self, ids: Iterable[int]) -> None:
        super().__init__(ids)
        self._seen: set[int] = set()
        self._found = np.empty(16, np.int64)
        self._read = 0

    @property
    def distinct(self) -> NDArray[np.int64]:
        """The ids that occur, each once; only those appended since the last time are looked at."""
        for place in range(self._read, len(self)):
            token = self[place]
            if token not in self._seen:
                if len(self._seen) == len(self._found):
                    self._found = np.concatenate([self._found, self._found])
                self._found[len(self._seen)] = token
                self._seen.add(token)
        self._read = len(self)
        return self._found[: len(self._seen)]


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divide the positive logits of tokens in the history by ``penalty``, multiply the negative ones.

    CTRL (arXiv 1909.05858); 1 changes nothing. What would be beyond the largest float32 stays at it.
    """

    penalty: float

    def __call__(self, history: History, logits: Logits) -> Logits:
        logits, most = np.array(logits), np.finfo(np.float32).max
        for row, ids in zip(logits, history, strict=True):
            seen = ids.distinct if isinstance(ids, TokenIds) else np.unique(np.asarray(ids, np.int64))
            value: NDArray[np.float64] = row[seen].astype(np.float64)
            with np.errstate(over="ignore"):
                changed = np.clip(
                    np.where(value > 0, value / self.penalty, value * self.penalty), -most, most
                )
            row[seen] = np.where(np.isfinite(value), changed, value)
        return logits


@dataclass(frozen=True)
class LogitBias:
    """Add a number to the logits of single tokens; ``-inf`` forbids one.

    What would be beyond the largest float32 stays at it.
    """

    bias: tuple[tuple[int, float], ...]

    def __call__(self, history: History, logits: Logits) -> Logits:
        made, (tokens, numbers) = np.array(logits), zip(*self.bias, strict=True)
        sums, most = made[:, list(tokens)] + np.array(numbers, np.float64), np.finfo(np.float32).max
        made[:, list(tokens)] = np.where(np.isneginf(sums), sums, np.clip(sums, -most, most))
        return made


@dataclass(frozen=True)
class MinTokens:
    """Forbid the end tokens in texts with fewer than ``least`` new tokens; ``prompts`` are the lengths of prompts."""

    least: int
    eos: Sequence[int]
    prompts: Sequence[int]

    def __call__(self, history: History, logits: Logits) -> Logits:
        made = np.array(logits)
        for ids, prompt, row in zip(history, self.prompts, made, strict=True):
            if len(ids) - prompt < self.least:
                row[list(self.eos)] = -np.inf
        return made


@dataclass(frozen=True)
class Temperature:
    """Divide the logits by ``temperature``; the largest of each row becomes 0, so that none overflows."""

    temperature: float

    def __call__(self, history: History, logits: Logits) -> Logits:
        with np.errstate(over="ignore"):
            return (logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)) / self.temperature


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
    ``min_p`` (0), ``typical_p`` (1) and ``top_h`` (0). ``repetition_penalty`` (1) and ``logit_bias``, which is added to
    the logits of single tokens (``{token: number}``, ``-inf`` forbids one), apply to both. ``seed`` makes the draws
    repeatable (its lowest 63 bits): row i of a batch draws from its own stream, whatever the other rows are.

    Numbers are kept as Python's own. Raises InputError for a value that is none, or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_h: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            keep(name, check_number(name, value, lambda x: 0 < x <= 1, "above 0 and at most 1"))
        for name in ("min_p", "top_h"):
            keep(name, check_number(name, getattr(self, name), lambda x: 0 <= x <= 1, "from 0 to 1"))
        keep("temperature", check_number("temperature", self.temperature, lambda x: x >= 0, "of at least 0"))
        penalty = check_number("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "above 0")
        keep("repetition_penalty", penalty)
        keep("top_k", check_integer("top_k", self.top_k, least=0))
        if self.seed is not None:
            keep("seed", check_integer("seed", self.seed, least=0))
        keep("logit_bias", _read_bias(self.logit_bias))

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raise InputError for a biased token that the model does not have."""
        for token, _ in cast("tuple[tuple[int, float], ...]", self.logit_bias):
            if token >= vocabulary:
                raise InputError(
                    f"logit_bias names token {token}, and the model has {vocabulary}; leave it out"
                )

    def processors(self) -> Iterator[LogitsProcessor]:
        """The processors that do something, in order; ``logit_bias`` comes before them all."""
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

    def changed(self) -> Iterator[str]:
        """The names of the options that are not their defaults."""
        return (option.name for option in fields(self) if getattr(self, option.name) != option.default)

    def drawing(self, batch: int, *, alone: bool = False) -> dict[str, np.ndarray]:
        """What a program that draws tokens itself is told, by role, a number for each row.

        Without a seed one is taken from the system. ``alone``: every row draws what it would in a batch of one.
        """
        made = {
            role: np.full(batch, getattr(self, role, 0) or 0, dtype) for role, (dtype, _) in DRAWING.items()
        }
        streams = Streams(self.seed, batch, alone=alone)
        return made | {"seed": streams.seeds, "stream": streams.rows}


def _read_bias(given: object) -> tuple[tuple[int, float], ...]:
    """Tokens and numbers, one for each token; raises InputError for what is none."""
    takes = "{token: number}"
    if isinstance(given, Mapping):
        pairs = tuple(cast("Mapping[object, object]", given).items())
    else:
        pairs = cast("tuple[tuple[object, object], ...]", check_kind("logit_bias", given, tuple, takes))
        for pair in pairs:
            if not isinstance(cast(object, pair), tuple) or len(pair) != 2:
                raise wrong("an item of logit_bias", cast(object, pair), "a token and its number")
        if len({token for token, _ in pairs}) < len(pairs):
            raise InputError("logit_bias names a token twice; give one number for each")
    return tuple((check_integer("a token of logit_bias", token, 0), _bias(token, x)) for token, x in pairs)


def _bias(token: object, number: object) -> float:
    if isinstance(number, float) and number == -np.inf:
        return float(number)
    return check_number(f"the logit_bias of token {token}", number, range_="or -inf")


def word(seed: int | None) -> int:
    """The bits of a seed that count; without one they are taken from the system."""
    return secrets.randbits(SEED_BITS) if seed is None else seed % 2**SEED_BITS


class Streams:
    """Random numbers for the rows of a batch, one for each token that is drawn; those of a drawing program."""

    def __init__(self, seed: int | None, batch: int, *, alone: bool = False) -> None:
        """``alone``: every row draws what it would in a batch of one, without a seed by one of its own."""
        self.seeds = np.array([word(seed) for _ in range(batch)]) if alone else np.full(batch, word(seed))
        self.rows = np.zeros(batch, np.int64) if alone else np.arange(batch)
        self._drawn = 0

    def numbers(self, row: int, counter: int, count: int, *, drafting: bool = False) -> NDArray[np.float32]:
        """The numbers ``counter .. counter + count - 1`` of a row; those for ``drafting`` are a stream of their own."""
        stream = ~self.rows[row : row + 1] if drafting else self.rows[row : row + 1]
        return uniforms(self.seeds[row : row + 1], stream, np.array([counter]), count)[0]

    def next(self) -> NDArray[np.float32]:
        """The next number of every row [batch], in [0, 1)."""
        counter = np.full(len(self.seeds), self._drawn)
        self._drawn += 1
        return uniforms(self.seeds, self.rows, counter, 1)[:, 0]


def choose(logits: Logits, temperature: float, streams: Streams) -> NDArray[np.int64]:
    """The next token of every row [batch]: the likeliest at temperature 0, else drawn from softmax(logits).

    A token is the first at which the cumulative distribution exceeds a random number: none of probability 0 is drawn.
    """
    if not temperature:
        return logits.argmax(axis=-1)
    cumulative = np.cumsum(softmax(logits), axis=-1)
    reached = streams.next().astype(np.float64) * cumulative[:, -1]
    return (cumulative <= reached[:, None]).sum(axis=-1)


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
