"""What became of a class, and the file of all outcomes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tokopt.place import writing

EQUAL, REFUSED, WRONG, FAILS, LIMIT, UNBUILT = "equal", "refused", "wrong", "fails", "limit", "unbuilt"
"""Says what the model says; refused with a typed sentence; says something else; an error that is not tokopt's; out of
time or memory; transformers itself does not build the small model, or does not run it."""

FAULTS = (WRONG, FAILS, LIMIT)
"""How no class may end."""


@dataclass(frozen=True)
class Ending:
    """How a class ended without a pass, or with one: ``detail`` is the refusal's sentence, or what went wrong."""

    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a class of a family: as it is, and by the text of each pass."""

    name: str
    family: str
    plain: Ending
    passes: Mapping[str, Ending] = field(default_factory=dict)

    @property
    def faults(self) -> list[tuple[str, Ending]]:
        """What must not be: (pass or nothing, how it ended)."""
        every = [("", self.plain), *self.passes.items()]
        return [(name, ending) for name, ending in every if ending.outcome in FAULTS]


def read_outcomes(path: Path) -> dict[str, Outcome]:
    """The outcomes of a file by class; none where there is no file."""
    if not path.exists():
        return {}
    listed = json.loads(path.read_text(encoding="utf-8"))["outcomes"]
    return {one["name"]: read_outcome(one) for one in listed}


def read_outcome(one: Mapping[str, object]) -> Outcome:
    given: dict = dict(one)
    passes = {name: Ending(**ending) for name, ending in given.pop("passes").items()}
    return Outcome(**given | {"plain": Ending(**given["plain"]), "passes": passes})


def write_outcomes(path: Path, outcomes: Mapping[str, Outcome]) -> None:
    """All outcomes, in the order of families and names."""
    from importlib.metadata import version

    ordered = sorted(outcomes.values(), key=lambda one: (one.family, one.name.lower()))
    content = {
        "transformers": version("transformers"),
        "torch": version("torch").split("+")[0],
        "outcomes": [asdict(one) for one in ordered],
    }
    with writing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
