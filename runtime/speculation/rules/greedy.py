"""Greedy: the likeliest token each time, as long as it was drafted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokopt.runtime.speculation.decisions import Decisions, Floats
from tokopt.runtime.speculation.draft import Drawn
from tokopt.runtime.speculation.rules.base import Prefix, Step, WalkingRule, likeliest


@dataclass(frozen=True)
class Greedy(WalkingRule):
    """Text as greedy decoding writes it, whatever the drafts; equal probabilities: the lowest id.

    ``p`` may be logits. Copies of a node are followed together, so that the longest match wins.
    """

    name = "greedy"
    exact_for = frozenset(Drawn)
    reads_q = False
    counts_copies = True

    def read_target(self, name: str, row: object) -> Floats:
        """The row as it is, after a check of its largest entry."""
        return np.asarray(likeliest(name, row)[1], np.float64)

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        """No decision is taken."""
        token = int(prefix.p.argmax())
        return Step(token, token if token in prefix.candidates else None)
