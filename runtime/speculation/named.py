"""Drafters and rules by name."""

from __future__ import annotations

from collections.abc import Sequence

from tokopt.arguments import check_integer, check_kind, check_text
from tokopt.errors import InputError
from tokopt.runtime.format.generation import Generation
from tokopt.runtime.speculation.calls import Speculation, Trees
from tokopt.runtime.speculation.draft import Drawn
from tokopt.runtime.speculation.drafters.base import Drafter
from tokopt.runtime.speculation.drafters.hybrid import Hybrid
from tokopt.runtime.speculation.drafters.logitspec import LogitSpec
from tokopt.runtime.speculation.drafters.lookahead import Lookahead
from tokopt.runtime.speculation.drafters.occurrences import Corpus
from tokopt.runtime.speculation.drafters.prompt_lookup import PromptLookup
from tokopt.runtime.speculation.drafters.suffix import Suffix
from tokopt.runtime.speculation.drafters.token_recycling import TokenRecycling
from tokopt.runtime.speculation.host import Method, check_pair
from tokopt.runtime.speculation.planner.shapes import Shapes
from tokopt.runtime.speculation.rules.base import Rule
from tokopt.runtime.speculation.rules.chain import Chain
from tokopt.runtime.speculation.rules.deterministic import Deterministic
from tokopt.runtime.speculation.rules.greedy import Greedy
from tokopt.runtime.speculation.rules.greedy_draft import GreedyDraft
from tokopt.runtime.speculation.rules.k_seq import KSeq
from tokopt.runtime.speculation.rules.lantern import Lantern
from tokopt.runtime.speculation.rules.same_text import SameText
from tokopt.runtime.speculation.rules.typical import Typical
from tokopt.runtime.speculation.rules.with_replacement import WithReplacement
from tokopt.runtime.speculation.rules.without_replacement import WithoutReplacement

DRAFTERS = ("suffix", "prompt_lookup", "token_recycling", "hybrid", "lookahead", "logitspec")

ADAPTIVE = 16
"""The most nodes of a call whose number is chosen by what calls took."""

MOST = 64
"""The most nodes of a call whose number a caller chooses."""

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        *(SameText, Greedy, Deterministic, Chain, WithReplacement, WithoutReplacement),
        *(KSeq, GreedyDraft, Typical, Lantern),
    )
}
"""Rules that need nothing but drafts and distributions; of others a caller gives an instance."""

WIDTH = 8
"""Followers that Token Recycling keeps of a token."""

_PREFERRED = (Drawn.DETERMINISTIC, Drawn.TOP_AND_ONE, Drawn.INDEPENDENT, Drawn.WITHOUT_REPLACEMENT)
"""How drafts are drawn for a rule: the first for which it is exact."""


def read_rule(accept: str | Rule | None, temperature: float = 0.0) -> Rule:
    """A rule, or the one of a name; None for one whose texts are those of plain decoding. Raises InputError."""
    if accept is None:
        return SameText() if temperature else Greedy()  # the same, but quicker
    if not isinstance(accept, str):
        return check_kind("accept", accept, Rule, f"one of {', '.join(RULES)}, or a rule")
    if accept not in RULES:
        raise InputError(f"accept={accept!r} is no rule that has a name; choose from {', '.join(RULES)}")
    return RULES[accept]()


def make_drafter(
    name: str, vocabulary: int, rule: Rule, corpus: Sequence[Sequence[int]] | None = None
) -> Drafter:
    """The drafter of a name, whose drafts a rule can verify; raises InputError where there is none.

    ``corpus`` are texts as token ids that ``suffix`` and ``hybrid`` know beforehand.
    """
    if check_text("drafter", name) not in DRAFTERS:
        raise InputError(f"drafter={name!r} is no drafter; choose from {', '.join(DRAFTERS)}")
    if corpus is not None and name not in ("suffix", "hybrid"):
        raise InputError(
            f"the drafter '{name}' knows no texts beforehand; leave the corpus out, or take suffix"
        )
    known = None if corpus is None else Corpus(corpus)
    drawn = next((way for way in _PREFERRED if way in rule.exact_for), Drawn.DETERMINISTIC)
    width = min(WIDTH, vocabulary)
    if name == "suffix":
        return Suffix(vocabulary, known, drawn)
    if name == "hybrid":
        return Hybrid(Suffix(vocabulary, known), TokenRecycling(vocabulary, width))
    if name == "token_recycling":
        return TokenRecycling(vocabulary, width)
    if name == "lookahead":
        return Lookahead()
    return PromptLookup() if name == "prompt_lookup" else LogitSpec(tops=min(64, vocabulary))


class Verification:
    """What a loaded model that verifies knows of drafters and rules, from one text to the next."""

    def __init__(self, path: object, settings: Generation, *, neighbours: bool = False) -> None:
        """``neighbours``: whether the model says which tokens are nearest to those that it reads."""
        self.path, self.vocabulary, self.neighbours = path, settings.vocabulary, neighbours
        self.most = min(MOST, settings.context)
        self._drafters: dict[tuple[str, Drawn], Drafter] = {}
        self._known: dict[tuple[str, Drawn, bool, int], tuple[Shapes, Speculation]] = {}

    def method(
        self, drafter: str | Drafter, accept: str | Rule | None, nodes: int | None, temperature: float
    ) -> Method:
        """How a generation is to speculate; raises InputError for a pair that does not fit, and nodes out of range."""
        rule = read_rule(accept, temperature)
        if isinstance(rule, Lantern) and rule.neighbours is None and not self.neighbours:
            raise InputError(
                f"{self.path} does not say which tokens are near each other, as the rule 'lantern' asks; make it with "
                "verify{neighbours=16}, or give Lantern(neighbours)"
            )
        chosen = self._named(drafter, rule) if isinstance(drafter, str) else drafter
        check_kind("drafter", chosen, Drafter, f"one of {', '.join(DRAFTERS)}, or a drafter")
        check_pair(chosen, rule, temperature)
        if nodes is not None:
            nodes = check_integer("nodes", nodes, 1, self.most)
        most = min(ADAPTIVE, self.most) if nodes is None else nodes
        chain = not (chosen.fills and rule.takes_trees)
        ranks = min(chosen.tops or self.vocabulary, self.vocabulary)
        key = (chosen.name, chosen.drawn, chain, most)
        if key not in self._known:
            shapes = Shapes(most, ranks, chain=chain)
            self._known[key] = shapes, Speculation(self.path, shapes.parents)
        shapes, speculation = self._known[key]
        if nodes is not None:
            shapes = Shapes(
                most, ranks, chain=chain
            )  # so that a seed gives one text, whatever was written before
        return Method(chosen, rule, Trees(speculation, nodes), shapes)

    def _named(self, name: str, rule: Rule) -> Drafter:
        """The drafter of a name: one for all texts, since what it learns outlives them."""
        made = make_drafter(name, self.vocabulary, rule)
        return self._drafters.setdefault((made.name, made.drawn), made)
