"""LANTERN: a token stands for its neighbours too, as far as a bound allows. Lossy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tokopt.arguments import check_number
from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Decisions, Floats
from tokopt.runtime.speculation.draft import Drawn
from tokopt.runtime.speculation.rules.base import Prefix, Step, WalkingRule
from tokopt.runtime.speculation.tree import Ints


@dataclass(frozen=True, eq=False)
class Lantern(WalkingRule):
    """Accept x with the probability of x and of its nearest neighbours (arXiv 2410.03355), for deterministic children.

    ``neighbours`` [vocabulary, k] are token ids, the nearest first; without them those count that the model says, made
    with the pass ``verify{neighbours=k}``. As many are counted as keep the probability that is
    moved at one place at ``delta`` or below, whichever children are tried, so that at every token the output's total
    variation distance from p is at most ``delta``. A rejection removes x and the neighbours that were counted with it;
    the published code removes all k, which is not exact at ``delta`` 0.
    """

    neighbours: Ints | Mapping[int, Ints] | None = None
    delta: float = 0.1

    name = "lantern"
    exact_for = frozenset(Drawn)
    reads_q = False
    counts_copies = True

    def __post_init__(self) -> None:
        check_number("delta", self.delta, lambda x: 0 <= x <= 1, "from 0 to 1")
        if self.neighbours is None or isinstance(self.neighbours, Mapping):
            return
        near = np.asarray(self.neighbours)
        inside = near.ndim == 2 and near.dtype.kind in "iu" and ((near >= 0) & (near < len(near))).all()
        if not inside:
            raise InputError("neighbours must be token ids [vocabulary, k], the nearest first")
        object.__setattr__(self, "neighbours", near.astype(np.int64))

    def among(self, neighbours: Mapping[int, Ints]) -> Lantern:
        """The rule with the neighbours of some tokens, where it was given none itself."""
        return self if self.neighbours is not None else Lantern(neighbours, self.delta)

    @property
    def lossy(self) -> str:
        """Probability moves to drafted tokens from their neighbours."""
        if not self.delta:
            return ""
        return f"it moves up to {self.delta:g} of the probability to drafted tokens from their neighbours"

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        """One decision per child that is possible at all, and a draw when none is accepted."""
        if self.neighbours is None:
            raise InputError(
                "the rule 'lantern' has no neighbours; give them, or verify with a model that has some"
            )
        if isinstance(self.neighbours, np.ndarray) and len(prefix.p) != len(self.neighbours):
            raise InputError(f"p has {len(prefix.p)} tokens, neighbours are given for {len(self.neighbours)}")
        left, budget = prefix.p.copy(), self.delta  # not normalised: the probability is in p's own terms
        for token in prefix.candidates:
            if not prefix.p[token]:
                continue  # a grammar, a bias or a cut of the distribution forbids it, whatever is near it
            near = self._counted(token, left, budget)
            moved, whole = float(left[near].sum()), float(left.sum())
            if whole > 0 and decisions.bernoulli(min(1.0, (float(left[token]) + moved) / whole)):
                return Step(token, token)
            budget -= moved
            left[near] = left[token] = 0
        whole = float(left.sum())
        # Nothing is left only where a rejection had no probability beyond rounding.
        return Step(decisions.draw(left / whole if whole > 0 else prefix.p))

    def _counted(self, token: int, left: Floats, budget: float) -> Ints:
        """The nearest neighbours of a token whose probabilities sum to at most ``budget``."""
        assert self.neighbours is not None
        near = self.neighbours[token]
        near = near[near != token]
        return np.unique(near[np.cumsum(left[near]) <= budget])
