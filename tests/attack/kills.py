"""Processes killed while they export, optimize or tune: the old artifact or the new one; the next run cleans up."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
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


def prepare(folder: Path) -> Callable[[Random, Path], bool]:
    tuning.interleaved_times = _times
    merged = tokopt.optimize(vision(), NEW)
    source = tokopt.export(vision(), folder / "source", target="torch")
    old = {t: tokopt.export(vision(), folder / t, target=t) for t in ("torch", "onnx")}

    def export_onto(place: Path, target: str) -> None:
        tokopt.export(merged, place, target=target, overwrite=True, check=False)

    def optimize_to(place: Path) -> None:
        if main(["optimize", str(source), NEW, "-o", str(place), "--json"]):
            raise SystemExit("optimize failed")

    def search(place: Path) -> None:
        tokopt.tune(vision(), SAMPLES, place, candidates=[["tome{r=1}", NEW]], floor="cosine>=-1")

    spans: dict[str, float] = {}

    def killed(rng: Random, name: str, work: Callable[[], object]) -> None:
        """Let ``work`` run in a process that is killed at a random moment of the time that it takes."""
        if name not in spans:
            spans[name] = _run(work, 600.0)
        else:
            _run(work, rng.random() * spans[name])

    def run(rng: Random, scratch: Path) -> bool:
        place = scratch / "a.tokopt"
        name = rng.choice(["torch", "torch", "torch", "onnx", "onnx", "first", "optimize", "tune"])
        if name in old:
            shutil.copytree(old[name], place)
            killed(rng, name, lambda: export_onto(place, name))
            _check(place, {OLD, NEW})
            export_onto(place, name)
        elif name == "first":
            killed(rng, name, lambda: export_onto(place, "torch"))
            _check(place, {None, NEW})
            export_onto(place, "torch")
        elif name == "optimize":
            killed(rng, name, lambda: optimize_to(place))
            _check(place, {None, NEW})
            if not place.exists():
                optimize_to(place)
        else:
            search(place)
            shutil.rmtree(place / "best.tokopt")
            killed(rng, name, lambda: search(place))
            _check(place / "best.tokopt", {None, NEW})
            search(place)
            left = [path for path in place.iterdir() if path.name.startswith(".")]
            assert not left, f"{left} is left"
            place = place / "best.tokopt"
        assert not [item for item in os.listdir(place.parent) if item.startswith(".")], "something is left"
        return tokopt.verify(place).ok and read_manifest(place).pipeline.startswith(NEW)

    return run


SAMPLES = [torch.randn(1, PATCHES, 12, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def _times(paths: list[str], *rest: Any) -> Iterator[tuple[float, float]]:
    yield 1.0 + 0.1 * len(read_manifest(Path(paths[1])).pipeline.replace("r=1", "")), 1.0


def _run(work: Callable[[], object], seconds: float) -> float:
    """The time that a process takes, of which it gets so much."""
    start = time.monotonic()
    child = os.fork()
    if not child:
        code = 1
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
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
    return seconds


def _check(place: Path, expected: set[str | None]) -> None:
    """A whole artifact of one of these pipelines is there, or (None) nothing."""
    if not place.exists():
        assert None in expected, "there is no artifact"
        return
    report = tokopt.verify(place)
    assert report.ok, report.faults
    found = report.pipeline.replace(",drop_unread", "").replace("drop_unread", "")
    assert found in expected, f"there is {found!r}"


KIND = Kind("kills", prepare)
