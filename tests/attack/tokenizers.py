"""Damaged tokenizers with the right hashes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.attack.case import Kind
from tests.attack.damage import change_meaning, damage_bytes, damage_json
from tests.attack.victims import attacked, behaviour, rehash, victims

ADDED = {
    "truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
    "padding": {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    },
    "normalizer": {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "x" * 1000},
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "added_tokens": [{"id": 2**31, "content": "cat", "single_word": False, "lstrip": False, "rstrip": False}],
}


def prepare(folder: Path) -> Callable[[Random, Path], bool]:
    victim = next(path for path in victims(folder) if (path / "tokenizer.json").exists())
    known = behaviour(victim)

    def run(rng: Random, scratch: Path) -> bool:
        path = attacked(victim, scratch)
        file = path / "tokenizer.json"
        whole = json.loads(file.read_text())
        match rng.randrange(4):
            case 0:
                file.write_bytes(damage_bytes(rng, file.read_bytes()))
            case 1:
                key = rng.choice(list(ADDED))
                file.write_text(json.dumps({**whole, key: ADDED[key]}))
            case 2:
                file.write_text(json.dumps(damage_json(rng, whole, rng.choice((1, 2)))))
            case _:
                file.write_text(json.dumps(change_meaning(rng, whole, rng.choice((1, 2)))))
        rehash(path)
        return behaviour(path) == known

    return run


KIND = Kind("tokenizers", prepare, other=True)
