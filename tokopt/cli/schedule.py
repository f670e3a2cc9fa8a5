"""The table of a model's programs: when each runs, how many blocks are behind a row then, and who leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tokopt.runtime.format.schedule import Entry, Schedule
from tokopt.runtime.format.signature import Signature, find_role


@dataclass(frozen=True)
class Run:
    """When a program runs. ``depth`` is how many blocks are computed then, 0 where nothing is said of it; ``exit``
    says that rows may leave after it.
    """

    program: str
    when: str
    depth: int
    exit: bool

    @property
    def cells(self) -> tuple[str, str, str]:
        """Program, time, and where in the model that is."""
        leaving = ", rows may leave" if self.exit else ""
        return self.program, self.when, f"after {blocks(self.depth)}{leaving}" if self.depth else ""


def blocks(count: int) -> str:
    """A number of blocks, as a depth is said: block 0 is the one that a depth of 1 ends after.

    >>> blocks(1), blocks(6)
    ('1 block', '6 blocks')
    """
    return f"{count} block{'s' * (count != 1)}"


RUN_HEADERS = ("program", "runs", "ends")


def runs(schedule: Schedule, programs: Mapping[str, Signature]) -> list[Run]:
    """A row for every run of a program: of the schedule's entries, in their order, and of its triggers."""

    def leaves(name: str) -> bool:
        return find_role(programs[name].outputs, "done") is not None

    found = [
        Run(name, when, entry.depth, leaves(name))
        for entry in schedule.entries
        for name, when in _calls(entry)
    ]
    for trigger in schedule.triggers:
        when = "once the prompt is read" if trigger.after == "prefill" else f"every {trigger.every} tokens"
        found.append(Run(trigger.program, when, 0, False))
    if schedule.whole is not None:
        found.append(Run(schedule.whole, "alone, in place of all that encode, for a batch of one", 0, False))
    return found


def _calls(entry: Entry) -> Iterator[tuple[str, str]]:
    """The programs of an entry, and when each runs."""
    when = f"{entry.role}, from token {entry.since} on" if entry.since else entry.role
    yield entry.program, f"{when}, with {len(entry.tree)} proposed" if entry.tree else when
    for before, name in zip(entry.programs, entry.then, strict=False):
        yield name, f"{entry.role}, after {before}"
