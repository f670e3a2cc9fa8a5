"""What several tests need and is slow to make: made once per run, whichever worker asks first."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_folders: list[Path] = []
"""The folder of this run, which all its workers have; ``tests/conftest.py`` says it."""


def share_folder(factory: pytest.TempPathFactory) -> None:
    """Have :func:`once` keep what it makes in the folder of this run."""
    base = factory.getbasetemp()
    _folders[:] = [base.parent if "PYTEST_XDIST_WORKER" in os.environ else base]


def once(name: str, make: Callable[[Path], object]) -> Path:
    """The file or folder that ``make(path)`` writes for the first worker that asks; the others wait for it.

    All see the same files: whoever changes them takes a copy first.
    """
    path = _folders[0] / "shared" / name
    path.parent.mkdir(exist_ok=True)
    with _locked(path.with_name(f"{name}.lock")):
        if not path.exists():
            unfinished = path.with_name(f"{name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a worker that failed
            make(unfinished)
            unfinished.rename(path)
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, also by a worker that dies
        yield
