"""PABEE (arXiv 2006.04152): several exits in a row that say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokopt.passes.exit.rules.base import Rule, Seen


@dataclass(frozen=True)
class Patience(Rule):
    """Rows leave whose likeliest class stayed the same over as many exits as the threshold says, after the first.

    Any change of the class starts the count anew. Every row has a count of its own, unlike the reference, which waits
    for the whole batch.
    """

    above: ClassVar[bool] = True
    limit: ClassVar[float] = 1e9

    def score(
        self, seen: Seen, carried: Sequence[Tensor], fitted: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The count; the class and the count are told to the next exit."""
        answer = seen.output.argmax(-1)
        if carried:
            before, count = carried
            count = torch.where(answer == before, count + 1, 0)
        else:
            count = torch.zeros_like(answer)
        return count.float(), [answer, count]

    def leaves(self, score: Tensor, threshold: float) -> Tensor:
        """A count that reaches the threshold is enough."""
        return score >= threshold

    def thresholds(self, scores: Tensor) -> list[float]:
        """All counts that there may be, the largest first."""
        return [float(count) for count in range(len(scores) - 1, 0, -1)]


RULE = Patience()
