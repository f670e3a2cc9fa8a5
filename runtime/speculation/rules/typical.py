"""Typical acceptance: take the longest path of tokens that are likely enough. Lossy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokopt.arguments import check_number
from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Decisions, Floats
from tokopt.runtime.speculation.distribution import read_distribution
from tokopt.runtime.speculation.draft import Draft, Drawn, Rows
from tokopt.runtime.speculation.rules.base import Accepted, Rule


@dataclass(frozen=True)
class Typical(Rule):
    """Accept x where p(x) > min(epsilon, alpha exp(-H(p))), H the entropy in nats (Medusa, arXiv 2401.10774).

    The deepest node whose path is accepted wins, among equally deep ones the likeliest path, then the first; the token
    behind it is the likeliest, so that every call commits one. No decision is taken.
    """

    epsilon: float = 0.09
    alpha: float = 0.3

    name = "typical"
    exact_for = frozenset[Drawn]()

    def __post_init__(self) -> None:
        for field in ("epsilon", "alpha"):
            check_number(field, getattr(self, field), lambda x: 0 <= x <= 1, "from 0 to 1")

    @property
    def lossy(self) -> str:
        """Any drafted token above the threshold is taken."""
        return "it takes every drafted token above a threshold instead of drawing from p"

    def verify(self, draft: Draft, p: Rows, decisions: Decisions) -> Accepted:
        """The deepest accepted path and the likeliest token behind it."""
        scores = {0: 0.0}  # accepted node -> log-probability of its path
        for node in range(draft.tree.nodes):
            children = draft.tree.children[node]
            if node not in scores or not children:
                continue
            row = read_distribution(f"p of node {node}", p[node])
            if int(draft.tokens[list(children)].max()) >= len(row):
                raise InputError(f"a child of node {node} is no token of the {len(row)} that p has")
            for child in children:
                likely = float(row[draft.tokens[child]])
                if likely > self.threshold(row):
                    scores[child] = scores[node] + float(np.log(likely))
        last = max(scores, key=lambda node: (draft.tree.depth[node], scores[node], -node))
        path = draft.tree.path(last)
        token = int(read_distribution(f"p of node {last}", p[last]).argmax())
        return Accepted(np.array(path), np.append(draft.tokens[list(path[1:])], token))

    def threshold(self, p: Floats) -> float:
        """What a token's probability must exceed."""
        likely = p[p > 0]
        return min(self.epsilon, self.alpha * float(np.exp(np.sum(likely * np.log(likely)))))
