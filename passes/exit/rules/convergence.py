"""Features that no longer change, for models without classes: the hidden-state rule of CALM (arXiv 2207.07061)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokopt.passes.exit.rules.base import Rule, Seen


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
        return cosine_similarity(output, carried[0], dim=-1).clamp(-1, 1), [output]


RULE = Convergence()
