"""K-SEQ: k independent drafts, each accepted by the same discounted ratio."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tokopt.runtime.speculation.decisions import Decisions, Floats
from tokopt.runtime.speculation.draft import Drawn
from tokopt.runtime.speculation.rules.base import Prefix, Step, WalkingRule


@dataclass(frozen=True)
class KSeq(WalkingRule):
    """Accept x with probability min(1, p(x) / (rho q(x))) (SpecTr, arXiv 2310.15141).

    With b(rho) = sum min(q, p / rho), k drafts accept with probability 1 - (1 - b)^k; what is left for the last draw
    is p - min(q, p / rho) (1 - (1 - b)^k) / b. The smallest rho in [1, k] for which nothing of it is negative accepts
    most; it solves 1 - (1 - b)^k = rho b.
    """

    name = "k_seq"
    exact_for = frozenset({Drawn.INDEPENDENT})
    counts_copies = True

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        """One decision per child that is tried, and a draw when none is accepted."""
        p, k = prefix.p, len(prefix.candidates)
        if not k:
            return Step(decisions.draw(p))
        q = prefix.drawn_from
        rho = smallest_rho(p, q, k)
        for token in prefix.candidates:
            if decisions.bernoulli(prefix.ratio(token, p / rho, q)):
                return Step(token, token)
        return Step(decisions.draw(remainder(p, q, k, rho)))


def smallest_rho(p: Floats, q: Floats, k: int) -> float:
    """The solution of 1 - (1 - b(rho))^k = rho b(rho) in [1, k], from above, to the last bit."""
    low, high, share = 1.0, float(k), accepted_share(p, q, k)
    while low < (middle := (low + high) / 2) < high:
        taken = share(middle)
        if 1 - (1 - taken) ** k > middle * taken:
            low = middle
        else:
            high = middle
    return high


def accepted_share(p: Floats, q: Floats, k: int) -> Callable[[float], float]:
    """b(rho) for rho in [1, k], as a function that looks at each token once.

    Tokens whose p / q is at least rho give q, the others p / rho; which is which changes for those between 1 and k.
    """
    drafted = q > 0
    p, q = p[drafted], q[drafted]
    with np.errstate(over="ignore"):
        ratio = p / q
    between = (ratio > 1) & (ratio < k)
    order = np.argsort(ratio[between])
    limits = ratio[between][order].tolist()
    below = (np.append(0, np.cumsum(p[between][order])) + p[ratio <= 1].sum()).tolist()
    above = (np.append(0, np.cumsum(q[between][order][::-1]))[::-1] + q[ratio >= k].sum()).tolist()

    def share(rho: float) -> float:
        place = bisect_left(limits, rho)
        return min(1.0, below[place] / rho + above[place])

    return share


def remainder(p: Floats, q: Floats, k: int, rho: float) -> Floats:
    """The distribution after ``k`` rejections; p where these have no probability beyond rounding."""
    taken = min(1.0, float(np.minimum(q, p / rho).sum()))
    if taken <= 0:
        return p
    left = np.maximum(p - np.minimum(q, p / rho) * ((1 - (1 - taken) ** k) / taken), 0)
    total = left.sum()
    return left / total if total > 0 else p
