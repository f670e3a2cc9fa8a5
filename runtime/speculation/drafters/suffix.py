"""SuffixDecoding: the continuations that followed the text's end most often."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tokopt.arguments import LARGEST, check_integer, check_kind, check_number
from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Decisions, Floats
from tokopt.runtime.speculation.draft import Draft, Drawn
from tokopt.runtime.speculation.drafters.base import Verified, fixed, read_prompt
from tokopt.runtime.speculation.drafters.occurrences import (
    Corpus,
    Grown,
    History,
    Source,
    following,
    grow,
    matches,
)
from tokopt.runtime.speculation.drawing import draw_tree
from tokopt.runtime.speculation.tree import Branches, Ints, Tree

Match = tuple[Source, int, Ints]
"""Tokens, how many of them match the end of the text, and the places behind."""


class Suffix:
    """Trees from the counts of the prompt and the output, and of a ``corpus`` (arXiv 2411.04975).

    For 1, 2, ... up to ``longest`` last tokens that occurred before, the most probable continuations make a tree of at
    most ``factor`` times as many tokens, none less probable than ``least``. The tree with the largest sum of
    probabilities is proposed; among equals that of the longer match, and the text's own before the corpus's.

    Where ``drawn`` is not DETERMINISTIC, the plan's nodes are drawn instead, from q: what followed each earlier
    occurrence, counted as often as tokens match there.
    """

    name = "suffix"
    tops = 0

    def __init__(
        self,
        vocabulary: int,
        corpus: Corpus | None = None,
        drawn: Drawn = Drawn.DETERMINISTIC,
        *,
        longest: int = 24,
        factor: float = 1.0,
        least: float = 0.1,
    ) -> None:
        self.vocabulary = check_integer("vocabulary", vocabulary, 1, LARGEST)
        self.corpus, self.drawn = corpus, check_kind("drawn", drawn, Drawn, "a member of Drawn")
        self.longest = check_integer("longest", longest, 1)
        self.factor = check_number("factor", factor, lambda x: x > 0, "above 0")
        self.least = check_number("least", least, lambda x: 0 < x <= 1, "above 0 and at most 1")
        if corpus is not None and corpus.tokens.max(initial=0) >= self.vocabulary:
            raise InputError(
                f"the corpus has token {corpus.tokens.max()}, the vocabulary {self.vocabulary} tokens"
            )

    @property
    def fills(self) -> bool:
        """Where it draws."""
        return self.drawn is not Drawn.DETERMINISTIC

    def open(self, prompt: Sequence[int]) -> SuffixText:
        """Start with a text."""
        ids = read_prompt(prompt)
        if max(ids) >= self.vocabulary:
            raise InputError(f"the prompt has token {max(ids)}, the vocabulary {self.vocabulary} tokens")
        return SuffixText(self, ids)


class SuffixText:
    """One text and its counts."""

    def __init__(self, method: Suffix, prompt: list[int]) -> None:
        self.method, self.history = method, History(prompt)
        corpus = [] if method.corpus is None else [method.corpus]
        self.sources: list[Source] = [*corpus, self.history]

    def propose(self, plan: Tree, decisions: Decisions) -> Draft:
        """The best tree of at most the plan's number of nodes, or the plan's nodes drawn."""
        if self.method.drawn is Drawn.DETERMINISTIC:
            return self.grow(self.matches(), plan.nodes)
        root = int(self.history.tokens[-1])
        return draw_tree(plan, root, self.next_token, self.method.drawn, decisions)

    def observe(self, verified: Verified) -> None:
        """Append the committed tokens."""
        self.history.extend(verified.accepted.tokens.tolist())

    def matches(self, ahead: Sequence[int] = ()) -> list[Match]:
        """Every length at which the text's end, with ``ahead`` behind it, occurred before; the corpus's come first."""
        longest = self.method.longest
        context = [*self.history.tokens[-longest:].tolist(), *ahead][-longest:]
        return [(source, *found) for source in self.sources for found in matches(source, context)]

    def grow(self, found: Sequence[Match], nodes: int) -> Draft:
        """The best tree of at most so many nodes, from what :meth:`matches` found."""
        best = Grown((), (), 0.0)
        for i, (source, length, places) in enumerate(found):
            if i + 1 < len(found) and found[i + 1][0] is source and len(found[i + 1][2]) == len(places):
                continue  # the next match is longer and has the same occurrences
            most = min(nodes - 1, math.floor(self.method.factor * length + 1e-6))
            grown = grow(source.tokens, places, most, self.method.least)
            best = grown if grown.score >= best.score else best
        branches = Branches(int(self.history.tokens[-1]))
        for parent, token in zip(best.parents, best.tokens, strict=True):
            branches.add(parent + 1, token)
        return fixed(branches)

    def next_token(self, prefix: tuple[int, ...]) -> Floats:
        """q [vocabulary] behind the text and the tokens of ``prefix``, the first of which is the text's last."""
        counts = np.zeros(self.method.vocabulary)
        for source, _, places in self.matches(prefix[1:]):
            after = following(source.tokens, places)
            np.add.at(counts, after[after >= 0], 1.0)
        total = counts.sum()
        return counts / total if total > 0 else counts
