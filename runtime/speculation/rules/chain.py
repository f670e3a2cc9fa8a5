"""Rejection sampling on a chain: accept by p / q, else draw from what q left of p."""

from __future__ import annotations

from dataclasses import dataclass

from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Decisions
from tokopt.runtime.speculation.distribution import residual
from tokopt.runtime.speculation.draft import Drawn
from tokopt.runtime.speculation.rules.base import Prefix, Step, WalkingRule


@dataclass(frozen=True)
class Chain(WalkingRule):
    """Accept x with probability min(1, p(x) / q(x)), else draw from [p - q]+ (arXiv 2211.17192, 2302.01318)."""

    name = "chain"
    exact_for = frozenset({Drawn.INDEPENDENT, Drawn.WITHOUT_REPLACEMENT, Drawn.TOP_AND_ONE})
    """One child is drawn from q in each of these."""
    takes_trees = False

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        """At most one decision and one draw."""
        if not prefix.candidates:
            return Step(decisions.draw(prefix.p))
        if len(prefix.candidates) > 1:
            raise InputError(
                f"a node has {len(prefix.candidates)} children, the rule 'chain' takes one; use a rule for trees"
            )
        token, q = prefix.candidates[0], prefix.drawn_from
        if decisions.bernoulli(prefix.ratio(token, prefix.p, q)):
            return Step(token, token)
        return Step(decisions.draw(residual(prefix.p, q)))
