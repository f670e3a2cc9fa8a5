"""Suffix decoding where the text's end occurred before at some length, else Token Recycling."""

from __future__ import annotations

from collections.abc import Sequence

from tokopt.arguments import check_integer
from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Decisions
from tokopt.runtime.speculation.draft import Draft, Drawn
from tokopt.runtime.speculation.drafters.base import Verified
from tokopt.runtime.speculation.drafters.suffix import Suffix, SuffixText
from tokopt.runtime.speculation.drafters.token_recycling import TokenRecycling, TokenRecyclingText
from tokopt.runtime.speculation.tree import Tree


class Hybrid:
    """Propose by ``suffix`` where at least ``least`` tokens match, else by ``recycling``; both observe everything.

    The threshold is that of SAM-Decoding (arXiv 2411.10666).
    """

    name = "hybrid"
    drawn = Drawn.DETERMINISTIC
    fills = True

    def __init__(self, suffix: Suffix, recycling: TokenRecycling, least: int = 5) -> None:
        self.suffix, self.recycling = suffix, recycling
        self.least = check_integer("least", least, 1)
        if suffix.drawn is not Drawn.DETERMINISTIC:
            raise InputError("the suffix drafter draws its tokens, a hybrid takes one that does not")

    @property
    def tops(self) -> int:
        """What Token Recycling observes."""
        return self.recycling.tops

    def open(self, prompt: Sequence[int]) -> HybridText:
        """Start with a text."""
        return HybridText(self.suffix.open(prompt), self.recycling.open(prompt), self.least)


class HybridText:
    """One text's two drafters."""

    def __init__(self, suffix: SuffixText, recycling: TokenRecyclingText, least: int) -> None:
        self.suffix, self.recycling, self.least = suffix, recycling, least

    def propose(self, plan: Tree, decisions: Decisions) -> Draft:
        """By one of the two."""
        found = self.suffix.matches()
        if max((length for _, length, _ in found), default=0) >= self.least:
            return self.suffix.grow(found, plan.nodes)
        return self.recycling.propose(plan, decisions)

    def observe(self, verified: Verified) -> None:
        """Both take note."""
        self.suffix.observe(verified)
        self.recycling.observe(verified)
