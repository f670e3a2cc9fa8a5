"""What is shared is made once and seen whole, whoever asks at the same time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.shared import once


def test_it_is_made_once_and_seen_whole(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        folder.mkdir()
        time.sleep(0.05)  # the others ask meanwhile
        (folder / "file").write_text("whole")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: once(tmp_path.name, make), range(8)))
    assert len(made) == len(set(found)) == 1
    assert [item.name for item in found[0].iterdir()] == ["file"]


def test_what_failed_is_made_anew(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        once(f"{tmp_path.name}-again", fail)
    assert not list(once(f"{tmp_path.name}-again", Path.mkdir).iterdir())
