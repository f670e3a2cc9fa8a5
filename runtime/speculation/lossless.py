"""Whether speculation keeps the target's distribution: a property of the rule and of how drafts are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from tokopt.runtime.speculation.draft import Drawn
from tokopt.runtime.speculation.rules.base import Rule


@dataclass(frozen=True)
class Lossless:
    """Whether a pair is lossless, and a sentence that says why not; empty where it is."""

    holds: bool
    reason: str = ""


def lossless(rule: Rule, drawn: Drawn) -> Lossless:
    """Whether verifying drafts drawn in this way keeps the distribution (greedy: the text of greedy decoding)."""
    if rule.lossy:
        return Lossless(False, f"the rule '{rule.name}' is lossy: {rule.lossy}")
    if drawn in rule.exact_for:
        return Lossless(True)
    wanted = " or ".join(way.value for way in Drawn if way in rule.exact_for)
    return Lossless(False, f"the rule '{rule.name}' is exact for drafts {wanted}; these are {drawn.value}")
