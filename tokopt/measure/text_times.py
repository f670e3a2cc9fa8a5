"""What a language model's artifact takes: for reading a prompt, for a token, for several at once, and of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokopt.errors import InputError
from tokopt.runtime import LanguageModel, load
from tokopt.runtime.engines.onnxruntime import Backend
from tokopt.runtime.format.manifest import OWN
from tokopt.runtime.loop import Emission, Request
from tokopt.runtime.rows import RowTimer, reads

STEPS = 8
"""Tokens that one timed call decodes."""

ROWS = (2, 4, 8, 16)
"""New tokens of one text in one call, whose cost is compared with that of one: what checking a draft takes."""


@dataclass(frozen=True)
class TextTimes:
    """One measurement, on a cache that begins empty.

    ``read`` are the seconds for the prompt, ``token`` those for one token after it, ``rows`` those of one call by the
    number of its new tokens. ``cache_bytes`` are allocated at the end, ``peak_bytes`` are the most that the process
    ever had in memory, None where the system does not tell.
    """

    read: float
    token: float
    rows: dict[int, float]
    cache_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class TextTimer:
    """What ``batch`` texts of ``prompt`` tokens take; see :class:`TextTimes`."""

    prompt: int
    batch: int = 1
    threads: int | None = None
    backend: Backend = "onnxruntime"

    def open(self, path: str) -> Callable[[], TextTimes]:
        """Open an artifact; raises InputError for one that draws its tokens itself."""
        model = _load(path, self.threads, self.backend)
        ids = (np.arange(self.prompt) % model.settings.vocabulary).tolist()
        counts = [count for count in ROWS if reads(model, count)]

        def measure() -> TextTimes:
            request = model.open(self.batch, self.prompt + STEPS + sum(counts))
            clock = time.perf_counter()
            emission = request.prefill([ids] * self.batch)
            read = time.perf_counter() - clock
            state = (_likeliest(emission), self.prompt)
            clock = time.perf_counter()
            position = decode(request, state)[1]
            token = (time.perf_counter() - clock) / STEPS
            rows: dict[int, float] = {}
            for count in counts:
                tokens = np.zeros((self.batch, count), np.int64)
                positions = np.tile(position + np.arange(count), (self.batch, 1))
                clock = time.perf_counter()
                request.step(tokens, positions)
                rows[count] = time.perf_counter() - clock
                position += count
            return TextTimes(read, token, rows, request.buffers.nbytes, peak_memory())

        return measure


@dataclass(frozen=True)
class DecodeTimer:
    """The seconds of one token after ``prompt`` of them; the cache goes on growing, and is compacted when due."""

    prompt: int
    threads: int | None = None

    def open(self, path: str) -> Callable[[], float]:
        """Open an artifact and read the prompt; raises InputError for one that draws its tokens itself."""
        model = _load(path, self.threads, "onnxruntime")
        ids = (np.arange(self.prompt) % model.settings.vocabulary).tolist()
        request = model.open(1, self.prompt + STEPS)
        state = [(_likeliest(request.prefill([ids])), self.prompt)]

        def measure() -> float:
            clock = time.perf_counter()
            state[0] = decode(request, state[0])
            return (time.perf_counter() - clock) / STEPS

        return measure


@dataclass(frozen=True)
class FormTimer:
    """What calls with these numbers of new tokens take after ``prompt`` tokens, in one form; see :class:`.RowTimer`."""

    form: str
    rows: tuple[int, ...]
    prompt: int
    threads: int | None = None

    def open(self, path: str) -> Callable[[], dict[int, float]]:
        """Open an artifact and read the prompt; raises InputError as :class:`.RowTimer` does."""
        model: LanguageModel = load(path, threads=self.threads, kernels=self.form == OWN)
        return RowTimer(model, self.rows, self.prompt, self.form).measure


def decode(request: Request, state: tuple[np.ndarray, int]) -> tuple[np.ndarray, int]:
    """Decode :data:`STEPS` tokens greedily; ``state`` is the next token of every row [batch] and its position."""
    token, position = state
    for _ in range(STEPS):
        emission = request.step(token[:, None], np.full((len(token), 1), position))
        token, position = _likeliest(emission), position + 1
    return token, position


def peak_memory() -> int | None:
    """The most bytes of memory that this process ever occupied, where the system tells."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def _load(path: str, threads: int | None, backend: Backend) -> LanguageModel:
    model: LanguageModel = load(path, threads=threads, backend=backend)
    if model.draws:
        raise InputError(
            f"{path} draws its tokens itself, so a token of it has no time of its own; time generate"
        )
    return model


def _likeliest(emission: Emission) -> np.ndarray:
    """The likeliest next token of every row [batch]."""
    assert emission.logits is not None
    return emission.logits[:, -1].argmax(-1)
