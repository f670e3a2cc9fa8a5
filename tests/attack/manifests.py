"""Manifests that say something else and carry the hash of it: what contradicts itself is refused when it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.attack.case import Kind
from tests.attack.damage import change_meaning, damage_json
from tests.attack.victims import attacked, behaviour, victims
from tests.runtime.artifacts import sealed


def prepare(folder: Path) -> Callable[[Random, Path], bool]:
    known = {path: behaviour(path) for path in victims(folder)}

    def run(rng: Random, scratch: Path) -> bool:
        victim = rng.choice(list(known))
        path = attacked(victim, scratch) / "manifest.json"
        whole = json.loads(path.read_text())
        part = rng.choice(["programs", "states", "links", "schedule", "generation", "files", ""])
        times, damage = rng.choice((1, 1, 2, 3)), damage_json if rng.random() < 0.1 else change_meaning
        if part and whole[part]:
            whole[part] = damage(rng, whole[part], times)
        else:
            whole = damage(rng, whole, times)
        try:
            text = json.dumps(sealed(whole))
        except (ValueError, LookupError, TypeError):  # its version is gone, or no number
            text = json.dumps(whole)
        path.write_text(text)
        return behaviour(path.parent) == known[victim]

    return run


KIND = Kind("manifests", prepare, other=True)
