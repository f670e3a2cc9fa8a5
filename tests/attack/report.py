"""The table of ``benchmarks/results/attack.md``, and the counts that it is made of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from benchmarks.machine import describe
from examples.data import write_atomically
from tests.attack.case import CRASH, FOREIGN, HANG, OTHER, OUTCOMES, REFUSED, SAME
from tests.attack.rounds import KILLS, Round, kind_of

PAGE = Path(__file__).parents[2] / "benchmarks" / "results" / "attack.md"
DATA = PAGE.with_suffix(".json")

_HEAD = """Cases of damaged files and bad arguments, and how they ended:
`python -m tests.attack --cases {cases} --kills {kills} --seed {seed} --report`.

*refused*: a typed error of one sentence. *same*: accepted, with the outputs of the undamaged thing (the damage was to
spacing, say, or to a file that nobody reads); for disks, writers and kills, a whole artifact, and nothing beside it.
*another*: accepted, and something else is computed; allowed where files say so and carry the right hashes, since a hash
is no signature. Crashes, hangs (a minute without an answer), and exceptions that are none of tokopt's are faults
anywhere.

| attack on | cases | refused | same | another | foreign exceptions | crashes | hangs | faults |
|---|---|---|---|---|---|---|---|---|
"""

_TITLES = {
    "artifacts": "files of artifacts: bytes, exchanged, removed, linked, added",
    "manifests": "manifests with the right hashes",
    "tokenizers": "tokenizers with the right hashes",
    "templates": "chat templates",
    "pt2 bytes": "`.pt2` files: bytes",
    "pt2 entries": "`.pt2` files: entries with the right checksums",
    "pipelines": "texts of pipelines",
    "arguments": "arguments of the runtime",
    "disks": "full disks, folders that take no files, impossible names",
    "writers": "two to five writers to one place",
    KILLS: "processes killed while they export, optimize or tune",
}


def add_to_report(name: str, round_: Round, seconds: float, seed: int, first: int) -> None:
    """Write the page anew with a round, which takes the place of one of its kind, or adds later cases to it."""
    known = json.loads(DATA.read_text()) if DATA.exists() else {}
    old = known.get(name, {}) if first else {}
    ends = Counter(result.outcome for result in round_.results)
    counted = {outcome: ends[outcome] + old.get(outcome, 0) for outcome in OUTCOMES}
    more = {"faults": len(round_.faults), "seconds": round(seconds), "cases": len(round_.results)}
    known[name] = counted | {key: value + old.get(key, 0) for key, value in more.items()} | {"seed": seed}
    write_atomically(DATA, lambda path: path.write_text(json.dumps(known, indent=1) + "\n"))
    write_atomically(PAGE, lambda path: path.write_text(page(known)))


def page(known: Mapping[str, Mapping[str, int]]) -> str:
    """The page of counts by kind."""
    rows = {name: known[name] for name in _TITLES if name in known}
    machine = describe(1)
    versions = cast("dict[str, str]", machine["versions"])
    cases = sum(row["cases"] for name, row in rows.items() if name != KILLS)
    head = _HEAD.format(
        cases=cases,
        kills=rows.get(KILLS, {}).get("cases", 0),
        seed=max((row["seed"] for row in rows.values()), default=0),
    )
    minutes = sum(row["seconds"] for row in rows.values()) / 60
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    foot = (
        f"{minutes:.0f} minutes on {machine['cpu']}, {machine['cores']} cores shared with other work, "
        f"{machine['system']}, Python {machine['python']}, {packages}"
    )
    return head + "\n".join(_row(name, row) for name, row in rows.items()) + f"\n\n{foot}.\n"


def _row(name: str, row: Mapping[str, int]) -> str:
    allowed = kind_of(name).other
    other = row[OTHER] if allowed or row[OTHER] else "none allowed"
    ends = [row[REFUSED], row[SAME], other, row[FOREIGN], row[CRASH], row[HANG]]
    cells = [_TITLES[name], row["cases"], *ends, row["faults"]]
    return "| " + " | ".join(map(str, cells)) + " |"
