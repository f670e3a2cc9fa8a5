"""Exits from the command line: where rows left, a fixed depth, and what an exit should save."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.cli.command import answer, complaint
from tokopt.cli import main
from tokopt.measure import machine
from tokopt.measure.machine import KINDS, ROWS, Machine
from tokopt.runtime import load

EXIT = "exit{after=[1,2] threshold=2.75 fit=own}"


def vit() -> tuple:
    from tests.zoo import ZOO

    return ZOO["vit"].build(), ZOO["vit"].inputs(batch=9), ZOO["vit"].dynamic


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zoo's model, with exits, and exported."""
    folder = tmp_path_factory.mktemp("exits")
    plain, staged, path = (str(folder / name) for name in ("plain.tokopt", "staged.tokopt", "onnx.tokopt"))
    assert main(["capture", "tests.cli.test_exit:vit", "-o", plain, "--json"]) == 0
    assert main(["optimize", plain, EXIT, "-o", staged, "--json"]) == 0
    assert main(["export", staged, "-o", path, "--json"]) == 0
    return folder


def test_run_says_where_rows_left(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "onnx.tokopt"
    data = answer(capsys, "run", path)
    assert sum(data["depths"].values()) == 9 and set(data["depths"]) <= {"1", "2", "3"}
    assert main(["run", str(path)]) == 0
    assert re.search(r"^rows left: \d after (1 block|[23] blocks)", capsys.readouterr().out, re.MULTILINE)


def test_run_at_a_depth(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, images = folder / "onnx.tokopt", np.load(_images(tmp_path))
    data = answer(capsys, "run", path, tmp_path / "images.npy", "--depth", "2", "-o", tmp_path / "out.npz")
    assert data["depths"] == {"2": 4}
    wanted = load(path, threads=1).run(images, depth=2)
    with np.load(tmp_path / "out.npz") as made:
        for name, value in wanted.items():
            np.testing.assert_allclose(made[name], value, atol=1e-5)


def _images(folder: Path) -> Path:
    images = np.random.default_rng(0).standard_normal((4, 3, 24, 24)).astype(np.float32)
    np.save(folder / "images.npy", images)
    return folder / "images.npy"


def test_depths_that_are_none_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "choose among 1, 2, 3" in complaint(capsys, 2, "run", folder / "onnx.tokopt", "--depth", "7")
    assert "means nothing to a model without exits" in complaint(
        capsys, 2, "run", folder / "plain.tokopt", "--depth", "1"
    )
    assert "has several programs" in complaint(capsys, 2, "run", folder / "staged.tokopt")


def test_verify_covers_the_program_of_all_stages(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = answer(capsys, "verify", folder / "onnx.tokopt")
    assert data["ok"] and "whole" in data["outputs"]


@pytest.mark.parametrize("path", ["staged.tokopt", "onnx.tokopt"])
def test_inspect_shows_every_stage_and_its_exit(
    path: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where each exit stands, by which rule, and what it promises, of both kinds of artifacts."""
    assert main(["inspect", str(folder / path)]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if "  encode  " in line]
    ends = [(line.split()[0], line.split(" after ")[1]) for line in rows]
    assert [(name, end[0], "rows may leave" in end) for name, end in ends] == [
        ("forward_1", "1", True),
        ("forward_2", "2", True),
        ("forward_3", "3", False),
    ]
    assert "the threshold 2.75 of entropy was given, and promises nothing" in printed


def test_inspect_counts_every_stage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Together the stages have the model's blocks, and more work than it, by that of the exits."""
    whole = answer(capsys, "inspect", folder / "plain.tokopt")
    stages = answer(capsys, "inspect", folder / "staged.tokopt")["programs"]
    assert [len(stage["blocks"]) for stage in stages.values()] == [1, 1, 1]
    assert [stage["blocks"][0]["tokens"] for stage in stages.values()] == whole["cost"]["tokens"]
    flops = [stage["cost"]["flops"] for stage in stages.values()]
    assert sum(flops) > whole["cost"]["flops"] > sum(flops) * 0.9
    assert list(whole["programs"]) == ["forward"]


def test_estimate_says_what_an_exit_saves(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that never leave pay for the heads, and those that leave save the blocks after.

    On a machine where products take the time: on a fast one, an op of this small model costs more than its numbers.
    """
    slow = Machine(1e10, dict.fromkeys(KINDS, tuple(1e-10 * rows for rows in ROWS)))
    monkeypatch.setattr(machine, "measure_machine", lambda: slow)
    data = answer(capsys, "estimate", folder / "plain.tokopt", EXIT)
    first, second = (data["predicted_speedup_of_exits"][depth] for depth in ("1", "2"))
    assert data["predicted_speedup"] <= 1 < second < first and not data["pays"]
    assert main(["estimate", str(folder / "plain.tokopt"), EXIT]) == 0
    assert "it pays where over" in capsys.readouterr().out


def test_bench_says_where_the_timed_rows_left(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A time holds for inputs that leave as these do."""
    path = folder / "onnx.tokopt"
    assert main(["bench", str(path), "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert (
        "its stored inputs leave after so many blocks: " in printed and "others take other times" in printed
    )
