"""The calls of a model that speculates: how many nodes each gets, and whether anything comes of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokopt.arguments import check_integer
from tokopt.runtime.speculation.planner.measured import MeasuredNodes

WATCHED = 64
"""Calls after which it is said that nothing is accepted."""

UNSAID = 1
"""The confidence of a program that says none."""

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

    def __init__(self, path: object, tree: Sequence[int]) -> None:
        """``tree`` has the parent of every node that the model proposes at most, -1 for the root."""
        self.path, self.tree = path, tree
        self._by_batch: dict[int, MeasuredNodes] = {}
        self._acceptances, self._warned = Acceptances(), False

    def measured(self, batch: int) -> MeasuredNodes:
        """What calls of a batch took and gave."""
        return self._by_batch.get(batch) or MeasuredNodes.of(self.tree)

    def learn(
        self, batch: int, nodes: int, seconds: float, committed: Sequence[tuple[int, int]], level: int
    ) -> None:
        """Let a call count; see :meth:`.MeasuredNodes.observe`."""
        self._by_batch[batch] = self.measured(batch).observe(nodes, seconds, committed, level)

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
        self.fixed = None if fixed is None else check_integer("nodes", fixed, 1, len(speculation.tree))
        self._level = UNSAID

    def sure(self, confidence: np.ndarray | None, limit: np.ndarray) -> None:
        """Take note of how sure a call is of what the next one would propose, if it says so.

        The surest of the rows that go on counts: those that may have a token, ``limit`` [batch].
        """
        live = limit > 0
        self._level = UNSAID if confidence is None or not live.any() else int(confidence[live].max())

    def next(self, limit: np.ndarray) -> int:
        """The nodes of the next call, whose rows may commit as many tokens as ``limit`` [batch] says."""
        if self.fixed is not None:
            return self.fixed
        return self.speculation.measured(len(limit)).choose(self._level, int(limit.max()))

    def observe(self, nodes: int, seconds: float, count: np.ndarray, limit: np.ndarray) -> None:
        """Take note of a call that committed ``count`` [batch] tokens."""
        live = limit > 0
        if self.fixed is None:
            committed = list(zip(count[live].tolist(), limit[live].tolist(), strict=True))
            self.speculation.learn(len(limit), nodes, seconds, committed, self._level)
        if limit.max() > 1:
            self.speculation.watch(nodes, float(count[live].mean()))
