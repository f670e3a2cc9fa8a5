"""Rejection sampling in several rounds, for children drawn independently."""

from __future__ import annotations

from dataclasses import dataclass

from tokopt.runtime.speculation.decisions import Decisions
from tokopt.runtime.speculation.distribution import residual
from tokopt.runtime.speculation.draft import Drawn
from tokopt.runtime.speculation.rules.base import Prefix, Step, WalkingRule


@dataclass(frozen=True)
class WithReplacement(WalkingRule):
    """As a chain, child after child: a rejection leaves [p - q]+ for the next one (SpecInfer, arXiv 2305.09781)."""

    name = "with_replacement"
    exact_for = frozenset({Drawn.INDEPENDENT})
    counts_copies = True

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        """One decision per child that is tried, and a draw when none is accepted."""
        p = prefix.p
        for token in prefix.candidates:
            q = prefix.drawn_from
            if decisions.bernoulli(prefix.ratio(token, p, q)):
                return Step(token, token)
            p = residual(p, q)
        return Step(decisions.draw(p))
