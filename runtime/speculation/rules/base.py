"""What accept rules have in common: their promises, and the walk down a tree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tokopt.arguments import check_integer
from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Decisions, Floats
from tokopt.runtime.speculation.distribution import read_distribution
from tokopt.runtime.speculation.draft import Draft, Drawn, Rows
from tokopt.runtime.speculation.tree import Ints


@dataclass(frozen=True, eq=False)
class Accepted:
    """What one call commits.

    ``path`` [n] are the nodes whose cache entries stay, from the root down; ``tokens`` [n] are the tokens that follow
    the root: those of the accepted nodes, and the one that the rule chose behind them, which is the next root.
    """

    path: Ints
    tokens: Ints

    def cut(self, most: int) -> Accepted:
        """The first ``most`` tokens and the nodes that stay for them: a text that ends early is still exact."""
        most = check_integer("most", most, 1)
        return Accepted(self.path[:most], self.tokens[:most])


@dataclass(frozen=True, eq=False)
class Prefix:
    """One place in the tree: candidates for the next token in the order of drawing, and the target's and the drafter's
    distributions [vocabulary]; ``q`` is None where the rule does not read it, or where nothing was drawn."""

    candidates: Sequence[int]
    p: Floats
    q: Floats | None

    @property
    def drawn_from(self) -> Floats:
        """The drafter's distribution, for rules that divide by it."""
        if self.q is None:
            raise InputError(
                "the draft has no q, and the rule divides by it; take a rule for drafts chosen without q"
            )
        return self.q

    def ratio(self, candidate: int, p: Floats, q: Floats) -> float:
        """p / q of a candidate, at most 1."""
        if q[candidate] <= 0:
            raise InputError(
                f"token {candidate} was drafted though its q is 0; give the distribution that it was drawn from"
            )
        return 1.0 if p[candidate] >= q[candidate] else float(p[candidate] / q[candidate])


@dataclass(frozen=True)
class Step:
    """A rule's choice at one place: the next token, and which candidate it is; None where the text leaves the tree."""

    token: int
    candidate: int | None = None


class Rule(ABC):
    """An accept rule. ``exact_for`` are the ways of drawing drafts for which it keeps the target's distribution."""

    name: ClassVar[str]
    exact_for: ClassVar[frozenset[Drawn]]
    reads_q: ClassVar[bool] = False
    """Whether it needs the distributions that drafts were drawn from."""
    takes_trees: ClassVar[bool] = True
    """Whether a node may have several children."""

    @property
    def lossy(self) -> str:
        """Why the rule changes the target's distribution whatever the drafts; empty where it does not."""
        return ""

    @abstractmethod
    def verify(self, draft: Draft, p: Rows, decisions: Decisions) -> Accepted:
        """What to commit, given the target's probabilities ``p`` [nodes, vocabulary] after each node.

        Raises InputError for rows that are read and are no distributions, and for drafts that do not fit the rule.
        """


class WalkingRule(Rule):
    """A rule that walks down from the root, and decides at every place among the children there."""

    reads_q: ClassVar[bool] = True
    counts_copies: ClassVar[bool] = False
    """Whether equal siblings are several drafts, as when they were drawn independently; else they are refused."""

    def verify(self, draft: Draft, p: Rows, decisions: Decisions) -> Accepted:
        """Walk from the root to the place where the rule leaves the tree."""
        nodes, tokens = [0], list[int]()  # several nodes: copies of one text
        while True:
            below = [child for node in nodes for child in draft.tree.children[node]]
            step = self.step(self._prefix(draft, p, nodes[0], below), decisions)
            tokens.append(step.token)
            if step.candidate is None:
                return Accepted(np.array(draft.tree.path(nodes[0])), np.array(tokens))
            nodes = [child for child in below if draft.tokens[child] == step.token]

    @abstractmethod
    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        """The next token after one prefix."""

    def read_target(self, name: str, row: object) -> Floats:
        """The target's row at a node as the rule reads it."""
        return read_distribution(name, row)

    def _prefix(self, draft: Draft, p: Rows, node: int, below: Sequence[int]) -> Prefix:
        target = self.read_target(f"p of node {node}", p[node])
        candidates = tuple(draft.tokens[list(below)].tolist())
        if not self.counts_copies and len(set(candidates)) < len(candidates):
            raise InputError(
                f"children of node {node} have the same token; merge duplicates before verifying"
            )
        if candidates and max(candidates) >= len(target):
            raise InputError(
                f"token {max(candidates)} was drafted, p of node {node} has {len(target)} tokens"
            )
        if not (candidates and self.reads_q and draft.q is not None):
            return Prefix(candidates, target, None)
        q = read_distribution(f"q of node {node}", draft.q[node])
        if len(q) != len(target):
            raise InputError(f"q of node {node} has {len(q)} tokens, p has {len(target)}")
        return Prefix(candidates, target, q)


def likeliest(name: str, row: object) -> tuple[int, NDArray[np.floating]]:
    """The first of the largest entries of a row [vocabulary] of probabilities or logits, and the row."""
    given = np.asarray(row)
    if given.ndim != 1 or not given.size:
        raise InputError(f"{name} has shape {given.shape}, it must be a row [vocabulary]")
    token = int(given.argmax())
    if not np.isfinite(given[token]):  # argmax finds NaN first
        raise InputError(
            f"{name} has {given[token]} as its largest entry; the model's output is no distribution"
        )
    return token, given
