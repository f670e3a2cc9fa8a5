"""What appears at the target while an export runs is never deleted, and several writers do not all report success.

The place was looked at once, at the start; at the end whatever was there was moved aside and removed. A kill between
the two moves left no artifact at all, and anything with a ``manifest.json`` counted as an artifact. The law: the move
itself refuses what must not be overwritten, there is an artifact at every moment, and the next writer removes what a
killed one left.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tokopt.place
from tokopt.errors import ArtifactError, InputError
from tokopt.place import alone, move_artifact, remove_artifact, replacing, writing

PORTABLE = pytest.mark.parametrize("portable", [False, True], ids=["linux", "portable"])
"""With the renames of Linux, and with those of any system."""


def fill(folder: Path, text: str) -> None:
    """Write what counts as an artifact, with one file."""
    (folder / "weights").write_text(text)
    manifest = {"format_version": 3, "files": {"weights": {}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def artifact(path: Path, text: str) -> Path:
    path.mkdir()
    fill(path, text)
    return path


def text_of(path: Path) -> str:
    return (path / "weights").read_text()


def a_file(path: Path) -> None:
    path.write_text("thesis")


def a_folder(path: Path) -> None:
    path.mkdir()
    a_file(path / "thesis.txt")


def a_link(path: Path) -> None:
    a_folder(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def another_manifest(path: Path) -> None:
    """The manifest of a web page."""
    a_folder(path)
    (path / "manifest.json").write_text('{"name": "a page", "files": []}')


def with_a_thesis(path: Path) -> None:
    a_file(artifact(path, "theirs") / "thesis.txt")


THINGS = [a_file, a_folder, a_link, another_manifest, with_a_thesis]


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "a.tokopt"


@pytest.fixture
def without_exchange(portable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if portable:
        monkeypatch.setattr(tokopt.place, "_renameat2", lambda *arguments: False)


@PORTABLE
@pytest.mark.usefixtures("without_exchange")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("appear", THINGS)
def test_what_appears_meanwhile_stays(
    appear: Callable[[Path], None], overwrite: bool, portable: bool, place: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"exists already|will not be overwritten"):  # noqa: SIM117
        with replacing(place, overwrite) as folder:
            fill(folder, "new")
            appear(place)
            before = contents(place) if place.is_dir() else place.read_text()
    assert before == (contents(place) if place.is_dir() else place.read_text())
    assert place.is_symlink() == (appear is a_link)
    assert set(os.listdir(place.parent)) <= {"a.tokopt", "elsewhere"}


@PORTABLE
@pytest.mark.usefixtures("without_exchange")
@pytest.mark.parametrize("appear", THINGS)
def test_what_takes_the_old_ones_place_meanwhile_stays(
    appear: Callable[[Path], None], portable: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes after the last look at the place, before the exchange."""
    artifact(place, "old")

    def look(path: Path, overwrite: bool) -> None:
        if path.is_dir() and not path.is_symlink() and text_of(path) == "old":
            remove_artifact(path)
            appear(path)

    with pytest.raises(ArtifactError, match="will not be overwritten"):  # noqa: SIM117
        with replacing(place, overwrite=True) as folder:
            fill(folder, "new")
            monkeypatch.setattr(tokopt.place, "check_place", look)
    assert "thesis" in (place.read_text() if place.is_file() else str(contents(place)))
    assert set(os.listdir(place.parent)) <= {"a.tokopt", "elsewhere"}


@PORTABLE
@pytest.mark.usefixtures("without_exchange")
def test_another_artifact_that_appears_after_the_last_look_stays(
    portable: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, looks = tokopt.place.check_place, 0

    def look(path: Path, overwrite: bool) -> None:
        nonlocal looks
        check(path, overwrite)
        looks += 1
        if looks == 2:
            artifact(path, "theirs")

    monkeypatch.setattr(tokopt.place, "check_place", look)
    with pytest.raises(ArtifactError, match="exists already"), replacing(place) as folder:
        fill(folder, "new")
    assert text_of(place) == "theirs" and os.listdir(place.parent) == ["a.tokopt"]


@PORTABLE
@pytest.mark.usefixtures("without_exchange")
@pytest.mark.parametrize("make", THINGS)
def test_only_an_artifact_is_overwritten(make: Callable[[Path], None], portable: bool, place: Path) -> None:
    make(place)
    with pytest.raises(ArtifactError, match="will not be overwritten"), replacing(place, overwrite=True):
        pytest.fail("it began")


@PORTABLE
@pytest.mark.usefixtures("without_exchange")
@pytest.mark.parametrize("overwrite", [False, True])
def test_of_several_writers_one_succeeds_unless_they_overwrite(
    overwrite: bool, portable: bool, place: Path
) -> None:
    def write(text: str) -> str:
        try:
            with replacing(place, overwrite) as folder:
                fill(folder, text)
            return text
        except ArtifactError:
            return ""

    for round_ in range(10):
        with ThreadPoolExecutor(6) as pool:
            done = [text for text in pool.map(write, [f"{round_}.{i}" for i in range(6)]) if text]
        assert text_of(place) in done
        if not overwrite:
            assert len(done) == 1 and os.listdir(place.parent) == ["a.tokopt"]
            remove_artifact(place)
    with replacing(place, overwrite) as folder:
        fill(folder, "last")
    assert text_of(place) == "last" and os.listdir(place.parent) == ["a.tokopt"]


def write_and_die(place: Path, moment: int, portable: bool) -> bool:
    """Overwrite the artifact in a process that is killed at the ``moment``-th end of a rename; whether it was."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    left = iter(range(moment - 1, -1, -1))

    def deadly(rename: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if not next(left, 1):
                os.kill(os.getpid(), signal.SIGKILL)
            result = rename(*arguments)
            if not next(left, 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.rename = deadly(os.rename)
    real = tokopt.place._renameat2
    tokopt.place._renameat2 = deadly((lambda *arguments: False) if portable else real)
    with replacing(place, overwrite=True) as folder:
        fill(folder, "new")
    os._exit(0)


@PORTABLE
def test_killed_around_every_rename_there_is_an_artifact(portable: bool, place: Path) -> None:
    """Where names cannot be exchanged, the old artifact is back when the next writer begins."""
    for moment in range(1, 12):
        artifact(place, "old")
        killed = write_and_die(place, moment, portable)
        if not portable:
            assert text_of(place) in ("old", "new")
        with pytest.raises(ArtifactError, match="exists already"), replacing(place):
            pytest.fail("nothing was there")
        assert text_of(place) in ("old", "new")
        with replacing(place, overwrite=True) as folder:
            fill(folder, "newer")
        assert text_of(place) == "newer" and os.listdir(place.parent) == ["a.tokopt"]
        remove_artifact(place)
        if not killed:
            assert moment > 2
            return
    pytest.fail("it never ended by itself")


def test_what_a_living_writer_has_begun_stays(place: Path) -> None:
    with replacing(place, overwrite=True) as folder:
        fill(folder, "first")
        with replacing(place) as other:
            fill(other, "second")
        with writing(place.with_name("notes")) as file:
            file.write_text("mine")
        assert text_of(place) == "second"
    assert text_of(place) == "first" and sorted(os.listdir(place.parent)) == ["a.tokopt", "notes"]


def test_a_folder_that_is_swept_before_it_is_locked_is_made_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, swept = tokopt.place._lock, []

    def late(path: Path, wait: bool) -> int | None:
        if wait and not swept:
            swept.append(path)
            path.rmdir()
        return lock(path, wait)

    monkeypatch.setattr(tokopt.place, "_lock", late)
    with replacing(place) as folder:
        fill(folder, "new")
    assert swept and text_of(place) == "new" and os.listdir(place.parent) == ["a.tokopt"]


def test_names_of_others_stay(place: Path) -> None:
    """Files beside the place that look alike are not taken for what a writer left."""
    names = [".a.tokopt.tmp", ".a.tokopt.notes.tmp", ".a.tokopt.0123456g.tmp", ".b.tokopt.01234567.tmp"]
    for name in names:
        place.with_name(name).write_text("mine")
    with replacing(place) as folder:
        fill(folder, "new")
    assert sorted(os.listdir(place.parent)) == sorted([*names, "a.tokopt"])


def test_an_artifact_moves_over_another(place: Path) -> None:
    artifact(place, "old")
    other = artifact(place.with_name("b.tokopt"), "new")
    move_artifact(other, place)
    assert text_of(place) == "new" and os.listdir(place.parent) == ["a.tokopt"]


def test_two_searches_in_one_folder(tmp_path: Path) -> None:
    """They would judge each other's candidates."""
    folder = tmp_path / "search"
    with alone(folder), pytest.raises(InputError, match="another process works in"), alone(folder):
        pytest.fail("there are two")
    with alone(tmp_path / "search"):
        pass
