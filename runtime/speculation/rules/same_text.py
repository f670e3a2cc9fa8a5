"""The text as without speculation: the model draws each token itself, and drafts that it agrees with are kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Decisions, Floats
from tokopt.runtime.speculation.distribution import TOLERANCE
from tokopt.runtime.speculation.draft import Drawn
from tokopt.runtime.speculation.rules.base import Prefix, Step, WalkingRule, likeliest


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
        given = np.asarray(likeliest(name, row)[1], np.float64)
        if not abs(float(given.sum()) - 1) <= TOLERANCE or given.min() < 0:
            raise InputError(f"{name} sums to {given.sum():.6g}; give probabilities that sum to 1")
        return given

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        """One draw."""
        token = decisions.draw(prefix.p)
        return Step(token, token if token in prefix.candidates else None)
