"""The loop of a speculating host, with a toy model in the place of a session."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.runtime.speculation.toys import NextToken, rows
from tokopt.runtime.speculation.decisions import Decisions, Uniforms
from tokopt.runtime.speculation.draft import Draft, Drawn
from tokopt.runtime.speculation.drafters.base import Drafter, TextDrafter, Verified
from tokopt.runtime.speculation.drafters.hybrid import Hybrid
from tokopt.runtime.speculation.drafters.logitspec import LogitSpec
from tokopt.runtime.speculation.drafters.lookahead import Lookahead
from tokopt.runtime.speculation.drafters.occurrences import Corpus
from tokopt.runtime.speculation.drafters.prompt_lookup import PromptLookup
from tokopt.runtime.speculation.drafters.suffix import Suffix
from tokopt.runtime.speculation.drafters.token_recycling import TokenRecycling
from tokopt.runtime.speculation.rules.base import Accepted, Rule
from tokopt.runtime.speculation.rules.chain import Chain
from tokopt.runtime.speculation.rules.deterministic import Deterministic
from tokopt.runtime.speculation.rules.greedy_draft import GreedyDraft
from tokopt.runtime.speculation.rules.k_seq import KSeq
from tokopt.runtime.speculation.rules.with_replacement import WithReplacement
from tokopt.runtime.speculation.rules.without_replacement import WithoutReplacement
from tokopt.runtime.speculation.tree import Tree

CORPUS = [[0, 1, 2, 0, 1, 1], [2, 1, 0, 1]]

DRAFTERS: dict[str, Callable[[int], Drafter]] = {
    "token_recycling": lambda size: TokenRecycling(size, min(size, 8)),
    "prompt_lookup": lambda size: PromptLookup(),
    "suffix": lambda size: Suffix(size),
    "suffix, corpus": lambda size: Suffix(size, Corpus(CORPUS)),
    "suffix, independent": lambda size: Suffix(size, None, Drawn.INDEPENDENT),
    "suffix, without replacement": lambda size: Suffix(size, None, Drawn.WITHOUT_REPLACEMENT),
    "suffix, top and one": lambda size: Suffix(size, Corpus(CORPUS), Drawn.TOP_AND_ONE),
    "lookahead": lambda size: Lookahead(3, 3, 3),
    "logitspec": lambda size: LogitSpec(tops=min(size, 8)),
    "hybrid": lambda size: Hybrid(Suffix(size), TokenRecycling(size, min(size, 8)), 2),
}
"""Drafters for a vocabulary of some size."""


RULES: list[Rule] = [Chain(), WithReplacement(), WithoutReplacement(), Deterministic(), KSeq(), GreedyDraft()]
"""Rules that sample and are exact for some way of drawing."""


class Host:
    """One text that a toy model writes with a drafter and a rule."""

    def __init__(self, drafter: Drafter, rule: Rule, model: NextToken, prompt: list[int]) -> None:
        self.rule, self.model, self.drafter = rule, model, drafter
        self.text: TextDrafter = drafter.open(prompt)
        self.tokens, self.calls = list(prompt), 0

    def start(self, decisions: Decisions) -> None:
        """The prompt's call: a tree of the last token alone."""
        self._verify(Draft(Tree.chain(1), np.array(self.tokens[-1:]), Drawn.DETERMINISTIC), decisions)

    def step(self, plan: Tree, decisions: Decisions) -> Accepted:
        """Propose, verify, commit."""
        before = used(decisions)
        draft = self.text.propose(plan, decisions)
        assert used(decisions) - before <= plan.nodes - 1
        assert draft.tokens[0] == self.tokens[-1] and draft.tree.nodes <= plan.nodes
        assert draft.drawn is self.drafter.drawn
        return self._verify(draft, decisions)

    def _verify(self, draft: Draft, decisions: Decisions) -> Accepted:
        before, taken = tuple(self.tokens[:-1]), used(decisions)
        p = rows(lambda text: self.model((*before, *text)), draft)
        accepted = self.rule.verify(draft, p, decisions)
        assert used(decisions) - taken <= draft.tree.nodes
        tops = self.drafter.tops
        top = np.argsort(-p, axis=1, kind="stable")[:, :tops] if tops else None
        self.text.observe(Verified(draft, accepted, top))
        self.tokens += accepted.tokens.tolist()
        self.calls += 1
        return accepted


def used(decisions: Decisions) -> int:
    """How many uniforms were taken; 0 where decisions come from elsewhere."""
    return decisions.used if isinstance(decisions, Uniforms) else 0


def written(host: Host, plan: Tree, count: int, decisions: Decisions) -> list[int]:
    """The prompt and at least ``count`` tokens after it."""
    wanted = len(host.tokens) + count
    host.start(decisions)
    while len(host.tokens) < wanted:
        host.step(plan, decisions)
    return host.tokens[:wanted]


def random_uniforms(seed: int, count: int = 100_000) -> Uniforms:
    return Uniforms(np.random.default_rng(seed).random(count))
