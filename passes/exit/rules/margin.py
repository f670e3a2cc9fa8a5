"""The softmax response of CALM (arXiv 2207.07061): how far the likeliest class is ahead of the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokopt.passes.exit.rules.base import Rule, Seen


@dataclass(frozen=True)
class Margin(Rule):
    """Rows leave whose two largest probabilities differ by more than the threshold."""

    above: ClassVar[bool] = True
    limit: ClassVar[float] = 1.0

    def score(
        self, seen: Seen, carried: Sequence[Tensor], fitted: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The difference; at most 1, which is not above the threshold 1."""
        first, second = seen.output.softmax(-1).topk(2, dim=-1).values.unbind(-1)
        return (first - second).clamp(max=1), []


RULE = Margin()
