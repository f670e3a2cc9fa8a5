"""What a search tries: a pipeline, and for models that verify a drafter of their host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokopt.arguments import check_text
from tokopt.errors import InputError
from tokopt.pipeline.manager import parse
from tokopt.runtime.speculation.named import DRAFTERS

OPTION = " --drafter "
"""Between the two in a candidate's text, as ``tokopt generate`` spells it."""


@dataclass(frozen=True)
class Candidate:
    """A pipeline, and what its host drafts with, by name; empty where it does not.

    >>> str(Candidate("keep_grid,verify", "suffix"))
    'keep_grid,verify --drafter suffix'
    """

    pipeline: str
    drafter: str = ""

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """The candidate of a text, in the one spelling of its pipeline; raises PassError and InputError for none."""
        pipeline, option, drafter = check_text("a candidate", text).partition(OPTION)
        passes, drafter = parse(pipeline).passes, drafter.strip()
        if option and drafter not in DRAFTERS:
            raise InputError(f"{text}: {drafter!r} is no drafter; choose from {', '.join(DRAFTERS)}")
        if option and (not passes or passes[-1].name != "verify"):
            raise InputError(f"{text}: a host drafts for a pipeline that ends with verify; put it there")
        return cls(",".join(map(str, passes)), drafter)

    @classmethod
    def joined(cls, parts: Sequence[Candidate]) -> Candidate:
        """Candidates of several kinds together, of which one has a drafter at most."""
        pipelines = ",".join(part.pipeline for part in parts)
        return cls(pipelines, next((part.drafter for part in parts if part.drafter), ""))

    def __str__(self) -> str:
        return self.pipeline + (OPTION + self.drafter if self.drafter else "")
