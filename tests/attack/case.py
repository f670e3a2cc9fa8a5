"""A case, and how it may end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tokopt.errors import TokoptError

REFUSED, SAME, OTHER, FOREIGN, CRASH, HANG = "refused", "same", "other", "foreign", "crash", "hang"
OUTCOMES = (REFUSED, SAME, OTHER, FOREIGN, CRASH, HANG)
"""``other``: accepted, with another result than the undamaged thing; ``foreign``: an exception that is none of ours."""


@dataclass(frozen=True)
class Kind:
    """One kind of attack.

    ``prepare`` makes, once per process and in a folder of its own, the function that runs a case: from its random
    numbers and an empty folder to whether the result is that of the undamaged thing. ``other``: another result is
    allowed, since the case is meant to say something else, which nobody signed.
    """

    name: str
    prepare: Callable[[Path], Callable[[Random, Path], bool]]
    other: bool = False

    def is_fault(self, outcome: str) -> bool:
        """Whether a case must not end so."""
        return outcome not in (REFUSED, SAME, *([OTHER] if self.other else []))


@dataclass(frozen=True)
class Result:
    """How a case ended, and what was said."""

    kind: str
    number: int
    outcome: str
    detail: str = ""


def run_case(kind: Kind, run: Callable[[Random, Path], bool], seed: int, number: int, folder: Path) -> Result:
    """Run a case in this process."""
    rng = Random(f"{kind.name} {seed} {number}")
    try:
        same = run(rng, folder)
        return Result(kind.name, number, SAME if same else OTHER)
    except TokoptError as error:
        said = str(error)
        sentence = said and "\n" not in said and len(said) < 1000
        return Result(kind.name, number, REFUSED if sentence else FOREIGN, f"{type(error).__name__}: {said}")
    except BaseException as error:
        return Result(kind.name, number, FOREIGN, f"{type(error).__name__}: {error}")
