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
    """Run a verb that must fail with ``code`` and one line on stderr."""
    capsys.readouterr()
    assert main([*map(str, argv)]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tokopt: error: ") and err.count("\n") == 1
    return err
