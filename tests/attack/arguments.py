"""Arguments of the wrong type, size or kind: refused by a sentence, or taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

import tokopt
from tests.attack.case import Kind
from tests.attack.victims import MESSAGES, TEXT, victims
from tokopt.runtime import Sampling, load

VALUES: tuple[Callable[[], Any], ...] = (
    *(
        lambda v=v: v
        for v in (None, True, False, 0, -1, 1, 3, 1.5, -0.5, float("nan"), float("inf"), 10**9, 10**30)
    ),
    *(
        lambda v=v: v
        for v in ("", "x", "cat", "\ud800", "a\0b", b"x", "x" * 10_000, "../..", "manifest.json", "é\n")
    ),
    *(
        list,
        dict,
        set,
        object,
        lambda: [None],
        lambda: [1, "a"],
        lambda: {"a": 1},
        lambda: [[1, 2], []],
        lambda: [[]],
    ),
    *(
        lambda: [1, 2.5],
        lambda: [True, 2],
        lambda: ["1"],
        lambda: [10**30],
        lambda: [-1],
        lambda: [3, 4],
        lambda: (5, 6),
    ),
    *(lambda: np.int64(3), lambda: np.float32(0.5), lambda: np.array([3, 4]), lambda: np.array([[3, 4]])),
    *(
        lambda: np.array(np.nan),
        lambda: np.zeros((2, 3, 32, 32), np.float32),
        lambda: np.zeros((0, 3, 32, 32), np.float32),
    ),
    *(
        lambda: np.full((2, 3, 32, 32), np.nan, np.float32),
        lambda: torch.tensor([3, 4]),
        lambda: torch.tensor(0.5),
    ),
    *(
        lambda: Path("x"),
        lambda: lambda *a: None,
        lambda: iter([3, 4]),
        lambda: range(3, 6),
        lambda: MESSAGES,
    ),
    *(
        lambda: [{"role": "user"}],
        lambda: [{"content": 1, "role": None}],
        lambda: Sampling,
        lambda: Sampling(top_k=2),
    ),
)


def prepare(folder: Path) -> Callable[[Random, Path], bool]:
    paths = victims(folder)
    encoder, text = load(paths[0], threads=1), load(paths[2], threads=1)
    fields = tuple(Sampling.__dataclass_fields__)

    def run(rng: Random, scratch: Path) -> bool:
        def value() -> Any:
            return rng.choice(VALUES)()

        calls: tuple[Callable[[], Any], ...] = (
            lambda: Sampling(**{rng.choice(fields): value()}),
            lambda: text.generate("cat", max_tokens=2, sampling=Sampling(**{rng.choice(fields): value()})),
            lambda: text.generate(value(), max_tokens=2),
            lambda: text.generate("cat", max_tokens=value()),
            lambda: text.generate(
                "cat", max_tokens=3, **{rng.choice(("stop", "sampling", "processors", "inputs")): value()}
            ),
            lambda: list(text.stream(value(), max_tokens=2)),
            lambda: list(text.tokens(value(), max_tokens=2)),
            lambda: text.score(value()),
            lambda: text.chat_prompt(value()),
            lambda: encoder(value()),
            lambda: encoder(**{encoder.signature.inputs[0].name: value()}),
            lambda: encoder(value(), value()),
            lambda: load(value()),
            lambda: load(paths[0], **{rng.choice(("threads", "backend", "providers")): value()}),
            lambda: tokopt.verify(value()),
            lambda: tokopt.open_bundle(value()),
            lambda: tokopt.parse(value()),
        )
        rng.choice(calls)()
        return True

    text.generate(TEXT, max_tokens=1)
    return run


KIND = Kind("arguments", prepare)
