"""The calls of a model that speculates: how many nodes each gets, and whether anything comes of it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from tokopt.arguments import check_integer
from tokopt.runtime.speculation.planner.measured import MeasuredNodes

WATCHED = 64
"""Calls after which it is said that nothing is accepted."""

LEAST, FEW = 8, 1 / 16
"""Calls with proposals among them, and accepted tokens of such a call, below which that is said."""


@dataclass
class Acceptances:
    """Counts over the last calls, :data:`WATCHED` at most: all, those that proposed, and the tokens accepted."""

    calls: int = 0
    proposing: int = 0
    accepted: float = 0.0

    def add(self, nodes: int, tokens: float) -> bool:
        """Count a call; whether it ends a row of calls in which about nothing was accepted."""
        self.calls += 1
        if nodes > 1:
            self.proposing += 1
            self.accepted += tokens - 1
        if self.calls < WATCHED:
            return False
        nothing = self.proposing >= LEAST and self.accepted < FEW * self.proposing
        self.calls, self.proposing, self.accepted = 0, 0, 0.0
        return nothing


class Speculation:
    """What is known of one loaded model, from one text to the next.

    Batches are apart, since their calls cost something else.
    """

    def __init__(self, path: object, most: int) -> None:
        """``most`` is the number of nodes of the model's tree."""
        self.path, self.most = path, most
        self._by_batch: dict[int, MeasuredNodes] = {}
        self._acceptances, self._warned = Acceptances(), False

    def measured(self, batch: int) -> MeasuredNodes:
        """The choice for a batch."""
        return self._by_batch.get(batch) or MeasuredNodes.of(self.most)

    def learn(self, batch: int, nodes: int, seconds: float, tokens: float) -> None:
        """Let a call count that committed so many tokens, of several rows their mean."""
        self._by_batch[batch] = self.measured(batch).observe(nodes, seconds, tokens)

    def watch(self, nodes: int, tokens: float) -> None:
        """Warn, once, where about nothing of what is proposed is accepted."""
        if self._acceptances.add(nodes, tokens) and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.path}: of the tokens proposed in {WATCHED} calls about none was accepted; on such texts "
                "speculation gains nothing",
                stacklevel=2,
            )


class Trees:
    """The nodes of the calls of one generation: a fixed number of them, or by what is known of the model."""

    def __init__(self, speculation: Speculation, fixed: int | None) -> None:
        """Raises InputError for a number of nodes that the tree does not have."""
        self.speculation = speculation
        self.fixed = None if fixed is None else check_integer("nodes", fixed, 1, speculation.most)

    def next(self, limit: np.ndarray) -> int:
        """The nodes of the next call, whose rows may commit as many tokens as ``limit`` [batch] says."""
        if self.fixed is not None:
            return self.fixed
        return self.speculation.measured(len(limit)).nodes if limit.max() > 1 else 1

    def observe(self, nodes: int, seconds: float, count: np.ndarray, limit: np.ndarray) -> None:
        """Take note of a call that committed ``count`` [batch] tokens."""
        if limit.max() <= 1:
            return  # there was no choice, and nothing could be accepted
        tokens = float(count[limit > 0].mean())
        if self.fixed is None:
            self.speculation.learn(len(limit), nodes, seconds, tokens)
        self.speculation.watch(nodes, tokens)
