"""Several processes that write to one place: one artifact is there at every moment, and who reports success was it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.attack.case import Kind
from tokopt.errors import ArtifactError
from tokopt.place import replacing
from tokopt.runtime.format.manifest import MANIFEST


def prepare(folder: Path) -> Callable[[Random, Path], bool]:
    return run


def run(rng: Random, scratch: Path) -> bool:
    place, overwrite, count = scratch / "a.tokopt", rng.random() < 0.5, rng.choice((2, 3, 5))
    if overwrite:
        with replacing(place) as folder:
            _fill(folder, "old")
    children = []
    for number in range(count):
        delays = [rng.random() * 0.004 for _ in range(3)]
        if not (child := os.fork()):
            _write(place, str(number), overwrite, delays)
        children.append(child)
    running, codes = set(children), {}
    while running:
        if overwrite:
            assert _read(place) in ("old", *map(str, range(count)))
        for child in list(running):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                running.discard(child)
                codes[children.index(child)] = os.waitstatus_to_exitcode(status)
    assert set(codes.values()) <= {0, 3}, f"a writer ended with {codes}"
    winners = [str(number) for number, code in codes.items() if code == 0]
    assert len(winners) == (count if overwrite else 1), f"{len(winners)} of {count} writers report success"
    return _read(place) in winners and os.listdir(scratch) == ["a.tokopt"]


def _write(place: Path, text: str, overwrite: bool, delays: list[float]) -> None:
    code = 1
    try:
        time.sleep(delays[0])
        with replacing(place, overwrite) as folder:
            time.sleep(delays[1])
            _fill(folder, text)
            time.sleep(delays[2])
        code = 0
    except ArtifactError:
        code = 3
    finally:
        os._exit(code)


def _fill(folder: Path, text: str) -> None:
    (folder / "weights").write_text(text)
    (folder / MANIFEST).write_text(json.dumps({"format_version": 4, "files": {"weights": {}}}))


def _read(place: Path) -> str:
    """What is there; a folder that was exchanged meanwhile is looked at again."""
    for _ in range(100):
        try:
            return (place / "weights").read_text()
        except FileNotFoundError:
            assert place.is_dir(), "there is no artifact"
    raise AssertionError("the artifact is incomplete")


KIND = Kind("writers", prepare)
