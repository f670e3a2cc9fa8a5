"""One class in a process of its own: how it ends, whatever it does."""

from __future__ import annotations

import os
import re
import resource
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import tokopt
from tests.sweep.classes import LANGUAGE, find
from tests.sweep.outcome import FAILS, LIMIT, REFUSED, UNBUILT, Ending, Outcome
from tokopt.errors import TokoptError
from tokopt.ir.bundle import Bundle

SECONDS, MEMORY = 240, 8 * 2**30
"""What a class may take; most take ten seconds."""

_LONGEST = 600
"""Characters of a refusal."""


def ending_of(run: Callable[[], Ending]) -> Ending:
    """How a run ends: a typed error of one sentence is a refusal, any other error a fault."""
    try:
        return run()
    except TokoptError as error:
        sentence = str(error)
        if "\n" in sentence or not sentence or len(sentence) > _LONGEST:
            return Ending(FAILS, f"not one sentence: {first_line(error)}")
        return Ending(REFUSED, _stable(sentence))
    except Exception as error:
        return Ending(FAILS, first_line(error))


def optimized(bundle: Bundle, text: str) -> Bundle:
    """The bundle after a pass; raises the pass's refusal where it did nothing."""
    made = tokopt.optimize(bundle, text)
    return made if made.history and made.history[-1].matches else tokopt.optimize(bundle, text, strict=True)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _stable(f"{type(error).__name__}: {lines[0] if lines else ''}")[:300]


def _stable(sentence: str) -> str:
    """A sentence without the folders of this machine."""
    return re.sub(r"(/[\w.\-]+)+/(?=[\w.\-]+)", "", sentence)


def run_class(name: str, family: str, folder: Path, passes: bool) -> Iterator[tuple[str, Ending]]:
    """The endings of a class, as they come."""
    from tests.sweep.tiny import build

    try:
        model = build(find(name))
    except Exception as error:
        yield "", Ending(UNBUILT, first_line(error))
        return
    module = import_module("tests.sweep.language" if family == LANGUAGE else "tests.sweep.encoders")
    yield from module.trial(model, folder, passes)


def run_all(chosen: Mapping[str, str], jobs: int, passes: bool) -> Iterator[tuple[Outcome, float]]:
    """The outcomes of classes, given with their families, and the seconds of each, ``jobs`` at a time, as they come."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.sweep.preload"])
    waiting, running = list(chosen.items()), list[_Running]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_Running(context, *waiting.pop(0), passes))
        wait([one.process.sentinel for one in running], timeout=1)
        for one in [one for one in running if one.ended()]:
            running.remove(one)
            yield one.outcome(), time.monotonic() - one.begun


class _Running:
    """A class whose process runs."""

    def __init__(self, context: Any, name: str, family: str, passes: bool) -> None:
        self.name, self.family = name, family
        self.begun, self.endings = time.monotonic(), dict[str, Ending]()
        self.folder = Path(tempfile.mkdtemp(prefix="tokopt-sweep-"))
        self.here, there = context.Pipe()
        self.process = context.Process(target=_work, args=(there, name, family, self.folder, passes))
        self.process.start()
        there.close()
        self.late = False

    def ended(self) -> bool:
        self._receive()
        if self.process.is_alive() and time.monotonic() - self.begun > SECONDS:
            self.late = True
            self.process.kill()
            self.process.join()
        if self.process.is_alive():
            return False
        self._receive()
        self.process.join()
        shutil.rmtree(self.folder, ignore_errors=True)
        return True

    def _receive(self) -> None:
        with suppress(EOFError, OSError):
            while self.here.poll():
                text, ending = self.here.recv()
                self.endings[text] = ending

    def outcome(self) -> Outcome:
        if self.late:
            broken = Ending(LIMIT, f"takes more than {SECONDS} seconds")
        else:
            broken = Ending(FAILS, f"its process ended with exit code {self.process.exitcode}")
        found = dict(self.endings)
        if self.late or self.process.exitcode != 0:
            found["(next)" if "" in found else ""] = broken
        plain = found.pop("", broken)
        return Outcome(self.name, self.family, plain, found)


def _work(connection: Connection, name: str, family: str, folder: Path, passes: bool) -> None:
    """Send the endings of a class; what it prints belongs to nobody."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    for text, ending in run_class(name, family, folder, passes):
        if ending.outcome == FAILS and "MemoryError" in ending.detail:
            ending = Ending(LIMIT, f"takes more than {MEMORY >> 30} GiB")
        connection.send((text, ending))
    connection.close()
