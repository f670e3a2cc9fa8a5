"""Rounds of cases, each in a process that is replaced when it crashes or hangs."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

from tests.attack.case import CRASH, HANG, OUTCOMES, Kind, Result, run_case

KILLS = "kills"
ROUNDS = {
    "artifacts": ("artifacts", "KIND", 10),
    "manifests": ("manifests", "KIND", 14),
    "tokenizers": ("tokenizers", "KIND", 6),
    "templates": ("templates", "KIND", 6),
    "pt2 bytes": ("pt2", "BYTES", 4),
    "pt2 entries": ("pt2", "ENTRIES", 4),
    "pipelines": ("pipelines", "KIND", 6),
    "arguments": ("arguments", "KIND", 8),
    "disks": ("disks", "KIND", 1),
    "writers": ("writers", "KIND", 2),
}
"""Kind -> its module, its name there, and its share of the cases."""

_SECONDS, _PREPARATION = 60, 900
"""What a case, and what comes before the first, may take on a machine that is busy; none takes more than a few."""

_MEMORY = 8 * 2**30


@dataclass(frozen=True)
class Round:
    """The cases of one kind."""

    kind: Kind
    results: Sequence[Result]

    @property
    def faults(self) -> list[Result]:
        return [result for result in self.results if self.kind.is_fault(result.outcome)]

    def line(self) -> str:
        """Counts by outcome."""
        found = Counter(result.outcome for result in self.results)
        ends = ", ".join(f"{found[outcome]} {outcome}" for outcome in OUTCOMES if found[outcome])
        return f"{self.kind.name}: {len(self.results)} cases: {ends}; {len(self.faults)} faults;"


def counts(cases: int, kills: int, only: str | None = None) -> dict[str, int]:
    """How many cases of each kind."""
    if only is not None:
        return {only: kills if only == KILLS else cases}
    whole = sum(share for *_, share in ROUNDS.values())
    found = {name: max(cases * share // whole, 1) for name, (*_, share) in ROUNDS.items()}
    return found | ({KILLS: kills} if kills else {})


def kind_of(name: str) -> Kind:
    module, attribute, _ = ROUNDS.get(name, (name, "KIND", 0))
    return getattr(import_module(f"tests.attack.{module}"), attribute)


def run_round(name: str, seed: int, numbers: Iterable[int]) -> Round:
    """Run the cases of a kind."""
    return Round(kind_of(name), list(_results(name, seed, list(numbers))))


def _results(name: str, seed: int, numbers: list[int]) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")
    while numbers:
        here, there = context.Pipe()
        folder = Path(tempfile.mkdtemp(prefix="tokopt-attack-"))
        process = context.Process(target=_work, args=(there, name, seed, numbers, folder), daemon=False)
        process.start()
        there.close()
        here.poll(_PREPARATION)
        try:
            while numbers:
                result = _next(here, name, numbers[0])
                numbers.pop(0)
                yield result
                if result.outcome in (CRASH, HANG):
                    break
        finally:
            here.close()
            if process.pid is not None and process.is_alive() and numbers:
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            shutil.rmtree(folder, ignore_errors=True)


def _next(connection: Connection, name: str, number: int) -> Result:
    try:
        if not connection.poll(_SECONDS * (4 if name == KILLS else 1)):
            return Result(name, number, HANG)
        found = connection.recv()
        return _next(connection, name, number) if found is None else found
    except EOFError:
        return Result(name, number, CRASH)


def _work(connection: Connection, name: str, seed: int, numbers: list[int], folder: Path) -> None:
    """Run cases in a process of their own; what it prints belongs to nobody."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    kind = kind_of(name)
    (folder / "whole").mkdir()
    run = kind.prepare(folder / "whole")
    connection.send(None)  # ready
    for number in numbers:
        scratch = folder / str(number)
        scratch.mkdir()
        connection.send(run_case(kind, run, seed, number, scratch))
        shutil.rmtree(scratch, ignore_errors=True)
