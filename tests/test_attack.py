"""A short round of :mod:`tests.attack`: cases of every kind but kills, which take minutes, end as they may."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from random import Random

import pytest

from tests.attack import rounds
from tests.attack.case import CRASH, FOREIGN, HANG, OTHER, REFUSED, SAME, Kind, run_case
from tests.attack.rounds import ROUNDS, counts, kind_of
from tokopt.errors import InputError

CASES = counts(250, kills=0)


@pytest.mark.parametrize("name", ROUNDS)
def test_no_case_is_a_fault(name: str, tmp_path: Path) -> None:
    kind = kind_of(name)
    (tmp_path / "whole").mkdir()
    run = kind.prepare(tmp_path / "whole")
    for number in range(CASES[name]):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        result = run_case(kind, run, 1, number, scratch)
        assert not kind.is_fault(result.outcome), result


def test_outcomes_are_told_apart(tmp_path: Path) -> None:
    def end(how: object) -> str:
        def run(rng: Random, scratch: Path) -> bool:
            if isinstance(how, BaseException):
                raise how
            return bool(how)

        return run_case(Kind("any", lambda folder: run), run, 0, 0, tmp_path).outcome

    assert [end(True), end(False), end(InputError("no"))] == [SAME, OTHER, REFUSED]
    for foreign in (
        KeyError("a"),
        InputError("two\nlines"),
        InputError(""),
        SystemExit(),
        InputError("x" * 1000),
    ):
        assert end(foreign) == FOREIGN
    strict, lenient = (
        Kind("a", lambda folder: lambda rng, scratch: True),
        Kind("b", lambda _: lambda r, s: True, True),
    )
    assert [strict.is_fault(o) for o in (REFUSED, SAME, OTHER, FOREIGN, CRASH, HANG)] == [
        False,
        False,
        *[True] * 4,
    ]
    assert [lenient.is_fault(o) for o in (OTHER, FOREIGN)] == [False, True]


def test_crashes_and_hangs_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_SECONDS", 0.05)
    here, there = multiprocessing.Pipe()
    assert rounds._next(here, "artifacts", 0).outcome == HANG
    there.close()
    assert rounds._next(here, "artifacts", 0).outcome == CRASH
