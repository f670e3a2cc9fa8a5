"""What a rule is: a score for every row at every exit, and the threshold at which rows leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

CANDIDATES = 200
"""Thresholds that are tried, at most."""


@dataclass(frozen=True)
class Seen:
    """What an exit knows of its rows.

    ``output`` [batch, n] is the output that decides, divided by the exit's temperature; for rules about classes its n
    entries are their logits. ``features`` [batch, channels] is what the head's last linear layer reads.
    """

    output: Tensor
    features: Tensor


@dataclass(frozen=True)
class Rule:
    """When rows leave. Scores are [batch] float32, and all functions but ``fit`` and ``thresholds`` are traced.

    ``classes`` says that the rule reads the output as logits, so that disagreement means another likeliest class;
    otherwise it is the cosine distance of outputs. ``limit`` is the threshold that no score meets, so that no row
    leaves early. ``above`` says that rows leave whose score is above the threshold, and otherwise below.
    """

    classes: ClassVar[bool] = True
    above: ClassVar[bool] = False
    limit: ClassVar[float] = 0.0

    def score(
        self, seen: Seen, carried: Sequence[Tensor], fitted: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The score, and what the next exit is told, each [batch, ...].

        ``carried`` is what the exit before told, empty at the first; ``fitted`` are the parameters of :meth:`fit`.
        """
        raise NotImplementedError

    def leaves(self, score: Tensor, threshold: float) -> Tensor:
        """Which rows leave [batch], bool."""
        return score > threshold if self.above else score < threshold

    def fit(self, seen: Sequence[Seen], losses: Sequence[Tensor]) -> list[Tensor]:
        """Parameters that all exits share, from what every exit saw of the same rows, and how wrong it was [rows]."""
        return []

    def thresholds(self, scores: Tensor) -> list[float]:
        """Thresholds from conservative to aggressive for scores [exits, rows] like these: their quantiles."""
        quantiles = torch.linspace(0, 1, CANDIDATES, dtype=torch.float64)
        found = torch.quantile(scores.double().flatten(), quantiles).unique().tolist()
        return found[::-1] if self.above else found
