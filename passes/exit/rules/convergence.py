"""Features that no longer change, for models without classes: the hidden-state rule of CALM (arXiv 2207.07061)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokopt.passes.exit.rules.base import Rule, Seen

TINY = 1e-30
"""The smallest product of two lengths."""


@dataclass(frozen=True)
class Convergence(Rule):
    """Rows leave whose output has a cosine with that of the exit before above the threshold.

    No row leaves at the first exit, which has none before it.
    """

    classes: ClassVar[bool] = False
    above: ClassVar[bool] = True
    limit: ClassVar[float] = 1.0

    def score(
        self, seen: Seen, carried: Sequence[Tensor], fitted: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The cosine, -1 at the first exit; the output is told to the next."""
        output = seen.output
        if not carried:
            return torch.full_like(output[:, 0], -1), [output]
        return _cosine(output, carried[0]).clamp(-1, 1), [output]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of the rows of two tensors, 0 where one is all zeros."""
    lengths = ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()
    return (a * b).sum(-1) / lengths.clamp_min(TINY)


RULE = Convergence()
