"""LogitSpec: the last logits' other candidates guess the token after the next, and lookups go on from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokopt.arguments import check_integer
from tokopt.runtime.speculation.decisions import Decisions
from tokopt.runtime.speculation.draft import Draft, Drawn
from tokopt.runtime.speculation.drafters.base import Verified, fixed, read_prompt
from tokopt.runtime.speculation.drafters.ngrams import NGrams
from tokopt.runtime.speculation.tree import Branches, Tree

OWN = 20
"""The longest lookup from the root itself."""


@dataclass(frozen=True)
class LogitSpec:
    """Chains below the root (arXiv 2507.01449), each continued by a lookup in the text.

    The first is the text's own lookup, of at most 20 tokens; then follows one per id that was likely where the root was
    chosen, the likeliest first. Such a chain has 4 tokens for the 8 likeliest, 3 up to the 32nd, then 1. Common
    beginnings are one node.
    """

    longest: int = 3
    tops: int = 64

    name = "logitspec"
    drawn = Drawn.DETERMINISTIC
    fills = False

    def __post_init__(self) -> None:
        check_integer("longest", self.longest, 1)
        check_integer("tops", self.tops, 1)

    def open(self, prompt: Sequence[int]) -> LogitSpecText:
        """Start with a text."""
        return LogitSpecText(self, read_prompt(prompt))


class LogitSpecText:
    """The n-grams of one text and the ids that were likely in the place of its last token."""

    def __init__(self, method: LogitSpec, prompt: list[int]) -> None:
        self.tops, self.text, self.likely = method.tops, NGrams(method.longest, prompt), list[int]()

    def propose(self, plan: Tree, decisions: Decisions) -> Draft:
        """Chains until the plan's number of nodes is used."""
        branches = Branches(self.text.tokens[-1])
        branches.extend(self.text.follow((), OWN), plan.nodes)
        for rank, token in enumerate(self.likely):
            if len(branches) >= plan.nodes:
                break
            branches.extend((token, *self.text.follow((token,), chain_length(rank) - 1)), plan.nodes)
        return fixed(branches)

    def observe(self, verified: Verified) -> None:
        """Append the committed tokens; the ids that stood beside the last one are the next guesses."""
        root = int(verified.accepted.tokens[-1])
        self.text.extend(verified.accepted.tokens.tolist())
        self.likely = [t for t in verified.top_of(int(verified.accepted.path[-1]), self.tops) if t != root]


def chain_length(rank: int) -> int:
    """Tokens of the chain of the candidate with this rank, from 0."""
    return 4 if rank < 8 else 3 if rank < 32 else 1
