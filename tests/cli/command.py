"""The command as tests call it."""

from __future__ import annotations

import json

import pytest

from tokopt.cli import main


def answer(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    """Run a verb with ``--json`` and read its answer; nothing else may be on stdout."""
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complaint(capsys: pytest.CaptureFixture[str], code: int, *argv: object) -> str:
    """Run a verb that must fail with ``code``: nothing on stdout, and one line of error after those of its stages."""
    capsys.readouterr()
    assert main([*map(str, argv)]) == code
    out, err = capsys.readouterr()
    *stages, error = err.splitlines(keepends=True)
    assert out == "" and error.startswith("tokopt: error: ") and error.endswith("\n")
    assert all(line.startswith("tokopt: ") and not line.startswith("tokopt: error") for line in stages)
    return error
