"""The text as without speculation: the model draws each token itself, and drafts that it agrees with are kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokopt.runtime.speculation.decisions import Decisions, Floats
from tokopt.runtime.speculation.distribution import read_distribution
from tokopt.runtime.speculation.draft import Drawn
from tokopt.runtime.speculation.rules.base import Prefix, Step, WalkingRule


@dataclass(frozen=True)
class SameText(WalkingRule):
    """Draw every token from p, by the random number of its place, and follow the draft as long as it has that token.

    One decision per token: with the same numbers the text is that of plain sampling, token for token, whatever is
    drafted. Rules that weigh drafts against p accept more of them, and write another text of the same distribution.
    """

    name = "same_text"
    exact_for = frozenset(Drawn)
    reads_q = False
    counts_copies = True

    def read_target(self, name: str, row: object) -> Floats:
        """The row as it is, since rounding it anew might tip a draw; it has to be a distribution."""
        read_distribution(name, row)
        return np.asarray(row, np.float64)

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        """One draw."""
        token = decisions.draw(prefix.p)
        return Step(token, token if token in prefix.candidates else None)
