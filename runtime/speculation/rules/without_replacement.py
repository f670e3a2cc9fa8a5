"""Rejection sampling in several rounds, for children drawn without replacement."""

from __future__ import annotations

from dataclasses import dataclass

from tokopt.runtime.speculation.decisions import Decisions
from tokopt.runtime.speculation.distribution import residual, without
from tokopt.runtime.speculation.draft import Drawn
from tokopt.runtime.speculation.rules.base import Prefix, Step, WalkingRule


@dataclass(frozen=True)
class WithoutReplacement(WalkingRule):
    """As with replacement, but a rejected token also leaves q, which is normalised anew: the next child was drawn so.

    Recursive rejection sampling (arXiv 2402.14160); Sequoia verifies the same way (arXiv 2402.12374).
    """

    name = "without_replacement"
    exact_for = frozenset({Drawn.WITHOUT_REPLACEMENT})

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        """One decision per child that is tried, and a draw when none is accepted."""
        p, q = prefix.p, prefix.q
        for token in prefix.candidates:
            q = prefix.drawn_from if q is None else q
            if decisions.bernoulli(prefix.ratio(token, p, q)):
                return Step(token, token)
            p, q = residual(p, q), without(q, token)
        return Step(decisions.draw(p))
