"""The table of ``benchmarks/results/attack.md``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from benchmarks.machine import describe
from tests.attack.case import CRASH, FOREIGN, HANG, OTHER, REFUSED, SAME
from tests.attack.rounds import KILLS, Round

PAGE = Path(__file__).parents[2] / "benchmarks" / "results" / "attack.md"

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


def write_report(rounds: Mapping[str, Round], seconds: Mapping[str, float], seed: int) -> None:
    """Write the page."""
    rows = [_row(name, round_) for name, round_ in rounds.items()]
    sizes = {name: len(round_.results) for name, round_ in rounds.items()}
    kills = sizes.pop(KILLS, 0)
    head = _HEAD.format(cases=sum(sizes.values()), kills=kills, seed=seed)
    machine = describe(1)
    foot = (
        f"\n{sum(seconds.values()) / 60:.0f} minutes on {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['system']}, Python {machine['python']}, "
        + ", ".join(f"{name} {version}" for name, version in dict(machine["versions"]).items())  # type: ignore[call-overload]
        + ".\n"
    )
    PAGE.write_text(head + "\n".join(rows) + "\n" + foot)


def _row(name: str, round_: Round) -> str:
    found = Counter(result.outcome for result in round_.results)
    ends = [found[outcome] for outcome in (REFUSED, SAME, OTHER, FOREIGN, CRASH, HANG)]
    other = str(ends[2]) if round_.kind.other else "none allowed" if not ends[2] else f"**{ends[2]}**"
    cells = [_TITLES[name], len(round_.results), *ends[:2], other, *ends[3:], len(round_.faults)]
    return "| " + " | ".join(map(str, cells)) + " |"
