"""Texts of pipelines: refused, or spelled back and read to the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import tokopt
from tests.attack.case import Kind
from tests.attack.damage import TEXTS
from tokopt.passes import PASSES

VALUES = (
    "0",
    "1",
    "-1",
    "8",
    "0.5",
    "1e400",
    "nan",
    "inf",
    "true",
    "none",
    "[1,2]",
    "[",
    "]",
    "all",
    "x",
    "1_000",
    "0x10",
)
JOINTS = (",", "{", "}", "=", " ", "{{", ",,", "", "\n", "\0", "é", "\ud800", "'", '"', "#", "%", "\\")
OPTIONS = (
    "r",
    "budget",
    "bits",
    "group",
    "press",
    "ratio",
    "keep",
    "every",
    "layers",
    "schedule",
    "symmetric",
    "length",
)


def text(rng: Random, depth: int = 0) -> str:
    """A pipeline of the right form with any values, now and then of another form."""
    passes = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice([*PASSES, "no_pass"])
        options = [f"{rng.choice(OPTIONS)}={_value(rng, depth)}" for _ in range(rng.randrange(3))]
        passes.append(f"{name}{{{' '.join(options)}}}" if options else name)
    made = ",".join(passes)
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        at = rng.randrange(len(made) + 1)
        made = made[:at] + rng.choice([*JOINTS, *TEXTS]) + made[at + rng.randrange(3) :]
    return made


def _value(rng: Random, depth: int) -> str:
    return text(rng, depth + 1) if depth < 30 and rng.random() < 0.2 else rng.choice(VALUES)


def prepare(folder: Path) -> Callable[[Random, Path], bool]:
    def run(rng: Random, scratch: Path) -> bool:
        given = text(rng) if rng.random() < 0.98 else "chunk{press=" * rng.choice((10, 1000)) + text(rng)
        parsed = tokopt.parse(given)
        return str(tokopt.parse(str(parsed))) == str(parsed)

    return run


KIND = Kind("pipelines", prepare)
