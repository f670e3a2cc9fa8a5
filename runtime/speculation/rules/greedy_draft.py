"""The verifier of drafts that are the likeliest tokens and one random token of the rest."""

from __future__ import annotations

from dataclasses import dataclass

from tokopt.runtime.speculation.decisions import Decisions
from tokopt.runtime.speculation.distribution import residual, without
from tokopt.runtime.speculation.draft import Drawn
from tokopt.runtime.speculation.rules.base import Prefix, Step, WalkingRule


@dataclass(frozen=True)
class GreedyDraft(WalkingRule):
    """All children but the last are q's likeliest tokens, the last is drawn from the rest d of q (arXiv 2502.18779).

    The random child is tried first, by min(1, p / d); then the others, each by its share of what is left. So p(top) +
    sum over the rest of min(p, d) is accepted, which is the most that any verifier of such drafts can accept. It does
    not matter how the other children were chosen, as long as the last was drawn from the rest of q.
    """

    name = "greedy_draft"
    exact_for = frozenset({Drawn.TOP_AND_ONE, Drawn.WITHOUT_REPLACEMENT})

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        """One decision per child that is tried, and a draw when none is accepted."""
        p = prefix.p
        if not prefix.candidates:
            return Step(decisions.draw(p))
        *top, last = prefix.candidates
        rest = prefix.drawn_from
        for token in top:
            rest = without(rest, token)
        if decisions.bernoulli(prefix.ratio(last, p, rest)):
            return Step(last, last)
        p = residual(p, rest)
        for token in top:
            if decisions.bernoulli(float(p[token])):
                return Step(token, token)
            p = without(p, token)
        return Step(decisions.draw(p))
