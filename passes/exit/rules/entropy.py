"""DeeBERT (arXiv 2004.12993): the entropy of the predicted classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tokopt.passes.exit.rules.base import Rule, Seen


@dataclass(frozen=True)
class Entropy(Rule):
    """Rows leave whose softmax has an entropy, in nats, below the threshold."""

    def score(
        self, seen: Seen, carried: Sequence[Tensor], fitted: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The entropy; at least 0, so that the threshold 0 lets no row leave, whatever is rounded."""
        logs = seen.output.log_softmax(-1)
        return -(logs.exp() * logs).sum(-1).clamp(max=0), []


RULE = Entropy()
