"""Disks that fill, folders that take no files, names that no file may have: an ArtifactError, and nothing is lost."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import tokopt
from tests.attack.case import Kind
from tests.lower.encoders import vision
from tests.runtime.artifacts import Json
from tokopt.errors import ArtifactError

NAMES = (os.fsdecode(b"a\xff.tokopt"), "a\0.tokopt", "a" * 250, "a" * 400, "no/folder", "", "/proc/a.tokopt")


def prepare(folder: Path) -> Callable[[Random, Path], bool]:
    whole = {t: tokopt.export(vision(), folder / t, target=t, check=False) for t in ("torch", "onnx")}

    def run(rng: Random, scratch: Path) -> bool:
        target = rng.choice(["torch", "torch", "torch", "onnx"])
        name = rng.choice(NAMES) if rng.random() < 0.2 else "a.tokopt"
        place = scratch / name
        old = rng.random() < 0.5 and name == "a.tokopt"
        if old:
            shutil.copytree(whole[rng.choice(list(whole))], place)
        before = _contents(scratch)
        most = max(file.stat().st_size for file in whole[target].iterdir())
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(2 * most), limits[1]))
        try:
            tokopt.export(vision(), place, target=target, overwrite=True, check=False)
        except ArtifactError:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert _contents(scratch) == before, "what was there has changed, or something is left"
            raise
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return tokopt.verify(place).ok and os.listdir(scratch) == [name]

    return run


def _contents(folder: Path) -> Json:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


KIND = Kind("disks", prepare)
