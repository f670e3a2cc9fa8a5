"""How much any verifier could accept: a diagnostic beside what a rule accepts (arXiv 2502.18779)."""

from __future__ import annotations

import numpy as np

from tokopt.arguments import check_integer
from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Floats
from tokopt.runtime.speculation.distribution import read_distribution


def most_accepted(p: Floats, q: Floats, drafts: int) -> float:
    """The largest probability with which one of ``drafts`` independent drafts from ``q`` [vocabulary] can be accepted
    while the output follows ``p`` [vocabulary].

    It is the smallest 1 + p(H) - q(H)^drafts over all sets H of tokens; the set that gives it holds the tokens with the
    lowest p / q.
    """
    p, q = _pair(p, q)
    drafts = check_integer("drafts", drafts, 1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        order = np.argsort(np.where(q > 0, p / q, np.inf), kind="stable")
    bounds = 1 + np.cumsum(p[order]) - np.cumsum(q[order]) ** drafts
    return float(min(1.0, bounds.min()))


def most_accepted_top_and_one(p: Floats, q: Floats, drafts: int) -> float:
    """The same where all drafts but one are q's likeliest tokens, the last is drawn from the rest d of q: p(top) + sum
    over the rest of min(p, d)."""
    p, q = _pair(p, q)
    drafts = min(check_integer("drafts", drafts, 1), int(np.count_nonzero(q)))
    top = np.argsort(-q, kind="stable")[: drafts - 1]
    rest = q.copy()
    rest[top] = 0
    return float(p[top].sum() + np.minimum(p, rest / rest.sum()).sum())


def _pair(p: Floats, q: Floats) -> tuple[Floats, Floats]:
    p, q = read_distribution("p", p), read_distribution("q", q)
    if len(p) != len(q):
        raise InputError(f"p has {len(p)} tokens, q has {len(q)}")
    return p, q
