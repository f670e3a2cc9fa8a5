"""Artifacts with damaged, exchanged, removed, linked or added files: refused, or what they were."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.attack.case import Kind
from tests.attack.damage import damage_bytes
from tests.attack.victims import attacked, behaviour, victims


def prepare(folder: Path) -> Callable[[Random, Path], bool]:
    known = {path: behaviour(path) for path in victims(folder)}

    def run(rng: Random, scratch: Path) -> bool:
        victim = rng.choice(list(known))
        path = attacked(victim, scratch)
        _damage(rng, path, rng.choice([victim, *known]))
        return behaviour(path) == known[victim]

    return run


def _damage(rng: Random, path: Path, other: Path) -> None:
    """Change a file in one of the ways of disks, copies and people; ``other`` is another artifact."""
    file = rng.choice(sorted(path.iterdir()))
    match rng.randrange(10):
        case 0:
            file.unlink()
        case 1:
            moved = shutil.move(file, path.parent / f"{file.name}.moved")
            file.symlink_to(moved)
        case 2:
            file.unlink()
            file.mkdir()
        case 3:
            second = rng.choice(sorted(path.iterdir()))
            first, last = file.read_bytes(), second.read_bytes()
            file.write_bytes(last)
            second.write_bytes(first)
        case 4:
            (path / rng.choice(["another.onnx", "._manifest.json", "weights.data.bak", "é"])).write_bytes(
                rng.randbytes(9)
            )
        case 5:
            file.write_bytes(rng.choice(sorted(other.iterdir())).read_bytes())
        case _:
            file.write_bytes(damage_bytes(rng, file.read_bytes()))


KIND = Kind("artifacts", prepare)
