"""Children that were chosen without chance, as a table, a lookup or a top-k chooses them."""

from __future__ import annotations

from dataclasses import dataclass

from tokopt.runtime.speculation.decisions import Decisions
from tokopt.runtime.speculation.distribution import without
from tokopt.runtime.speculation.draft import Drawn
from tokopt.runtime.speculation.rules.base import Prefix, Step, WalkingRule


@dataclass(frozen=True)
class Deterministic(WalkingRule):
    """Accept x with probability p(x); a rejected token leaves p, which is normalised anew.

    The output follows p given any tree, so it does for every way of drawing one. A second copy of a token has nothing
    left to be accepted with.
    """

    name = "deterministic"
    exact_for = frozenset(Drawn)
    reads_q = False
    counts_copies = True

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        """One decision per child that is tried, and a draw when none is accepted."""
        p = prefix.p
        for token in prefix.candidates:
            if decisions.bernoulli(float(p[token])):
                return Step(token, token)
            p = without(p, token)
        return Step(decisions.draw(p))
