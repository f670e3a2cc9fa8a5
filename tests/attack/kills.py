"""Processes killed while they export, optimize or tune: the old artifact or the new one; the next run cleans up."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

import tokopt
from tests.attack.case import Kind
from tests.lower.encoders import PATCHES, vision
from tokopt.cli import main
from tokopt.measure import tuning
from tokopt.runtime.format.manifest import read_manifest

OLD, NEW = "", "tome{r=2}"
"""The pipelines of the two artifacts."""


@dataclass(frozen=True)
class _Job:
    """What is killed: the work on a place, what is there before, and which pipelines may be there afterwards."""

    work: Callable[[Path], object]
    old: Path | None
    expected: frozenset[str | None]


def prepare(folder: Path) -> Callable[[Random, Path], bool]:
    tuning.interleaved_times = _times
    merged = tokopt.optimize(vision(), NEW)
    source = tokopt.export(vision(), folder / "source", target="torch")
    lowered = tokopt.export(vision(), folder / "lowered")

    def export(place: Path, target: str) -> None:
        tokopt.export(merged, place, target=target, overwrite=True, check=False)

    def optimize(place: Path) -> None:
        if not place.exists() and main(["optimize", str(source), NEW, "-o", str(place), "--json"]):
            raise SystemExit("optimize failed")

    def tune(place: Path) -> None:
        tokopt.tune(vision(), SAMPLES, place, candidates=[["tome{r=1}", NEW]], floor="cosine>=-1")

    jobs = {
        "export torch": _Job(lambda place: export(place, "torch"), source, frozenset((OLD, NEW))),
        "export onnx": _Job(lambda place: export(place, "onnx"), lowered, frozenset((OLD, NEW))),
        "export to nothing": _Job(lambda place: export(place, "torch"), None, frozenset((None, NEW))),
        "optimize": _Job(optimize, None, frozenset((None, NEW))),
        "tune": _Job(tune, None, frozenset((None, "tome{r=1}", NEW))),
    }
    spans = {
        name: _run(lambda job=job, name=name: job.work(folder / name)) or 0.0 for name, job in jobs.items()
    }

    def run(rng: Random, scratch: Path) -> bool:
        name = rng.choices(list(jobs), (4, 3, 1, 1, 1))[0]
        job, number = jobs[name], 0
        while True:
            number += 1
            place = scratch / str(number) / "a.tokopt"
            place.parent.mkdir()
            if job.old is not None:
                shutil.copytree(job.old, place)
            if _run(lambda place=place: job.work(place), rng.random() * spans[name]) is None:
                break
        artifact = place / "best.tokopt" if name == "tune" else place
        _check(artifact, job.expected)
        job.work(place)
        left = [str(path) for path in scratch.rglob("*") if path.name.startswith(".")]
        assert not left, f"{left} is left"
        return tokopt.verify(artifact).ok and read_manifest(artifact).pipeline.startswith(NEW)

    return run


SAMPLES = [torch.randn(1, PATCHES, 12, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def _times(paths: list[str], *rest: Any) -> Iterator[tuple[float, float]]:
    yield 1.0 + 0.1 * len(read_manifest(Path(paths[1])).pipeline.replace("r=1", "")), 1.0


def _run(work: Callable[[], object], seconds: float = 600.0) -> float | None:
    """The time that a process takes; None when it was killed after so many seconds."""
    start = time.monotonic()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work()
            code = 0
        finally:
            os._exit(code)
    while time.monotonic() < start + seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"the process ended with {status}"
            return time.monotonic() - start
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _check(place: Path, expected: frozenset[str | None]) -> None:
    """A whole artifact of one of these pipelines is there, or (None) nothing."""
    if not place.exists():
        assert None in expected, "there is no artifact"
        return
    report = tokopt.verify(place)
    assert report.ok, report.faults
    found = report.pipeline.replace(",drop_unread", "").replace("drop_unread", "")
    assert found in expected, f"there is {found!r}"


KIND = Kind("kills", prepare)
