"""Prompt lookup: what followed the text's last n-gram where it occurred before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokopt.arguments import check_integer
from tokopt.runtime.speculation.decisions import Decisions
from tokopt.runtime.speculation.draft import Draft, Drawn
from tokopt.runtime.speculation.drafters.base import Verified, fixed, read_prompt
from tokopt.runtime.speculation.drafters.ngrams import NGrams
from tokopt.runtime.speculation.tree import Branches, Tree


@dataclass(frozen=True)
class PromptLookup:
    """A chain copied from the prompt or the output (Saxena, 2023).

    The longest n-gram of at most ``longest`` tokens counts, and of several occurrences the first, which has the most
    tokens behind it. As many are copied as the plan has nodes and the text has tokens; published code asks for 10.
    """

    longest: int = 3

    name = "prompt_lookup"
    drawn = Drawn.DETERMINISTIC
    fills = False
    tops = 0

    def __post_init__(self) -> None:
        check_integer("longest", self.longest, 1)

    def open(self, prompt: Sequence[int]) -> PromptLookupText:
        """Start with a text."""
        return PromptLookupText(self.longest, read_prompt(prompt))


class PromptLookupText:
    """The n-grams of one text; about ``longest`` entries of a dictionary per token."""

    def __init__(self, longest: int, prompt: list[int]) -> None:
        self.text = NGrams(longest, prompt)

    def propose(self, plan: Tree, decisions: Decisions) -> Draft:
        """A chain of at most the plan's number of nodes."""
        branches = Branches(self.text.tokens[-1])
        branches.extend(self.text.follow((), plan.nodes - 1), plan.nodes)
        return fixed(branches)

    def observe(self, verified: Verified) -> None:
        """Append the committed tokens."""
        self.text.extend(verified.accepted.tokens.tolist())
