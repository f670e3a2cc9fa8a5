"""Toy models, and all that can happen when something takes decisions, with exact probabilities."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from typing import TypeVar

import numpy as np

from tokopt.runtime.speculation.decisions import Decisions, Floats
from tokopt.runtime.speculation.draft import Draft, Drawn
from tokopt.runtime.speculation.drawing import draw_tree
from tokopt.runtime.speculation.rules.base import Rule
from tokopt.runtime.speculation.tree import Tree

T = TypeVar("T")
Text = tuple[int, ...]
NextToken = Callable[[Text], Floats]


class Scripted:
    """Takes the branches it is told to, then the first possible one; notes what else was possible."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.taken, self.counts, self.probability = script, list[int](), list[int](), 1.0

    def bernoulli(self, probability: float) -> bool:
        return bool(self._branch([(1, probability), (0, 1 - probability)]))

    def draw(self, distribution: Floats) -> int:
        assert distribution.min() >= 0 and abs(distribution.sum() - 1) < 1e-9
        return self._branch(list(enumerate(distribution.tolist())))

    def _branch(self, outcomes: list[tuple[int, float]]) -> int:
        possible = [(outcome, p) for outcome, p in outcomes if p > 0]
        place = len(self.taken)
        chosen = self.script[place] if place < len(self.script) else 0
        self.taken.append(chosen)
        self.counts.append(len(possible))
        outcome, p = possible[chosen]
        self.probability *= p
        return outcome


def branches(run: Callable[[Decisions], T]) -> Iterator[tuple[T, float]]:
    """Every result of ``run``, once per way of deciding, with its probability."""
    script: list[int] | None = []
    while script is not None:
        decisions = Scripted(script)
        yield run(decisions), decisions.probability
        script = next_script(decisions.taken, decisions.counts)


def next_script(taken: list[int], counts: list[int]) -> list[int] | None:
    """The branch after this one, depth first."""
    for place in reversed(range(len(taken))):
        if taken[place] + 1 < counts[place]:
            return [*taken[:place], taken[place] + 1]
    return None


def toy(vocabulary: int, seed: int, sharpness: float = 1.5, zeros: float = 0.0) -> NextToken:
    """A random model: a next-token distribution for every text, some of its entries exactly zero."""

    @cache
    def next_token(text: Text) -> Floats:
        # A seed that only ends in more zeros is the same seed.
        source = np.random.default_rng((seed, *(token + 1 for token in text)))
        weight = np.exp(sharpness * source.normal(size=vocabulary))
        weight *= source.random(vocabulary) >= zeros
        weight[source.integers(vocabulary)] += 1e-3
        return weight / weight.sum()

    return next_token


def rows(model: NextToken, draft: Draft) -> Floats:
    """The model's distribution after each node [nodes, vocabulary]."""
    paths = [draft.tree.path(node) for node in range(draft.tree.nodes)]
    return np.stack([model(tuple(draft.tokens[list(path)].tolist())) for path in paths])


def sequences(model: NextToken, start: Text, length: int) -> dict[Text, float]:
    """The probability of every continuation of so many tokens."""
    found = {(): 1.0}
    for _ in range(length):
        found = {
            (*text, token): weight * p
            for text, weight in found.items()
            for token, p in enumerate(model((*start, *text)).tolist())
        }
    return found


def completed(model: NextToken, start: Text, text: Text, length: int) -> dict[Text, float]:
    """``text`` continued by the model to so many tokens."""
    rest = sequences(model, (*start, *text), length - len(text))
    return {(*text, *more): weight for more, weight in rest.items()}


def error_of(found: dict[Text, float], wanted: dict[Text, float]) -> float:
    """The largest difference of a probability."""
    return max(abs(found.get(text, 0) - wanted.get(text, 0)) for text in {*found, *wanted})


Drafting = Callable[[Decisions], Draft]


def distribution_of(rule: Rule, drafting: Drafting, target: NextToken, length: int) -> dict[Text, float]:
    """The exact distribution of the first ``length`` tokens after one call, continued by plain sampling."""
    texts: dict[Text, float] = defaultdict(float)
    drafts: dict[tuple[bytes, bytes], list] = {}
    for draft, weight in branches(drafting):
        known = drafts.setdefault((draft.tree.parent.tobytes(), draft.tokens.tobytes()), [draft, 0.0])
        known[1] += weight
    for draft, drawing in drafts.values():
        p = rows(target, draft)
        for accepted, weight in branches(lambda decisions, d=draft, p=p: rule.verify(d, p, decisions)):
            assert accepted.path[0] == 0 and len(accepted.tokens) == len(accepted.path)
            np.testing.assert_array_equal(draft.tokens[accepted.path[1:]], accepted.tokens[:-1])
            texts[tuple(accepted.tokens[:length].tolist())] += drawing * weight
    found: dict[Text, float] = defaultdict(float)
    for text, weight in texts.items():
        for whole, more in completed(target, (0,), text, length).items():
            found[whole] += weight * more
    return dict(found)


def drawing(plan: Tree, drafter: NextToken, drawn: Drawn) -> Drafting:
    """Drafting by drawing a plan's tokens below token 0."""
    return lambda decisions: draw_tree(plan, 0, drafter, drawn, decisions)


def one_hot(vocabulary: int, token: int) -> Floats:
    found = np.zeros(vocabulary)
    found[token] = 1
    return found
