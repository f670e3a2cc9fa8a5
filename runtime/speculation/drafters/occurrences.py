"""Where the end of a text occurred before, and what followed: counts as in a suffix tree, without building one."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tokopt.runtime.speculation.tree import Ints

END = -1
"""Stands between the texts of a corpus; follows nothing and is followed by nothing."""


class Source(Protocol):
    """Tokens in which occurrences are looked for."""

    @property
    def tokens(self) -> Ints:
        """All tokens."""
        ...

    def behind(self, token: int) -> Ints:
        """The places behind every occurrence of a token, in order."""
        ...


class History:
    """The tokens of one text, which grows; 8 bytes per token, at most doubled."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens, self._length = np.empty(max(16, len(tokens)), np.int64), 0
        self.extend(tokens)

    @property
    def tokens(self) -> Ints:
        """The text so far."""
        return self._tokens[: self._length]

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        end = self._length + len(tokens)
        if end > len(self._tokens):
            self._tokens = np.concatenate([self.tokens, np.empty(end, np.int64)])
        self._tokens[self._length : end] = tokens
        self._length = end

    def behind(self, token: int) -> Ints:
        """The places behind every occurrence of a token, the end of the text among them."""
        return np.flatnonzero(self.tokens == token) + 1


class Corpus:
    """Texts that are known beforehand, with an index by token; 16 bytes per token."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._tokens = np.array([token for text in texts for token in (*text, END)], np.int64)
        self._order = np.argsort(self._tokens, kind="stable")
        self._sorted = self._tokens[self._order]

    @property
    def tokens(self) -> Ints:
        """All texts, each with END behind it."""
        return self._tokens

    def behind(self, token: int) -> Ints:
        """The places behind every occurrence of a token."""
        return (
            self._order[np.searchsorted(self._sorted, token) : np.searchsorted(self._sorted, token, "right")]
            + 1
        )


def matches(source: Source, context: Sequence[int]) -> Iterator[tuple[int, Ints]]:
    """For 1, 2, ... last tokens of ``context``: their number, and the places behind their occurrences.

    It ends with the context, or before a number of tokens whose occurrences are followed by nothing.
    """
    tokens, places = source.tokens, np.empty(0, np.int64)
    for length in range(1, len(context) + 1):
        if length == 1:
            places = source.behind(context[-1])
        else:
            places = places[places >= length]
            places = places[tokens[places - length] == context[-length]]
        if not (following(tokens, places) >= 0).any():
            return
        yield length, places


def following(tokens: Ints, places: Ints) -> Ints:
    """The tokens at some places; END behind the last one."""
    return np.where(places < len(tokens), tokens[np.minimum(places, len(tokens) - 1)], END)


def continuations(tokens: Ints, places: Ints) -> list[tuple[int, Ints]]:
    """The tokens that follow at some places, and the places behind each.

    The most frequent comes first, among equals the one that followed last in the text.
    """
    after = following(tokens, places)
    if len(after) == 1:
        return [] if after[0] < 0 else [(int(after[0]), places + 1)]
    order = np.argsort(after, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(after[order])) + 1)
    found = [(int(after[group[0]]), places[group] + 1) for group in groups if after[group[0]] >= 0]
    return sorted(found, key=lambda item: (-len(item[1]), -int(item[1][-1])))


@dataclass(frozen=True)
class Grown:
    """Nodes of a tree of continuations: parents (-1: the text itself), tokens, and the sum of their probabilities."""

    parents: tuple[int, ...]
    tokens: tuple[int, ...]
    score: float


def grow(tokens: Ints, places: Ints, nodes: int, least: float) -> Grown:
    """The up to ``nodes`` most probable continuations of the occurrences that end at ``places``.

    A node's probability is its parent's times its share of the parent's occurrences, those that nothing follows
    included. Of equal probabilities the one found first wins; below ``least`` there are no nodes.
    """
    parents, chosen, score, age = list[int](), list[int](), 0.0, 0
    heap: list[tuple[float, int, int, int, Ints]] = []

    def push(parent: int, probability: float, behind: Ints) -> None:
        nonlocal age
        for token, places in continuations(tokens, behind):
            heapq.heappush(heap, (-probability * (len(places) / len(behind)), age, parent, token, places))
            age += 1

    push(-1, 1.0, places)
    while heap and len(chosen) < nodes:
        negative, _, parent, token, behind = heapq.heappop(heap)
        if -negative < least:
            break
        parents.append(parent)
        chosen.append(token)
        score -= negative
        push(len(chosen) - 1, -negative, behind)
    return Grown(tuple(parents), tuple(chosen), score)
