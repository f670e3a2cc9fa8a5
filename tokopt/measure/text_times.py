"""What a language model's artifact takes: for reading a prompt, for a token, for several at once, and of memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from tokopt.errors import InputError
from tokopt.runtime import LanguageModel, load
from tokopt.runtime.engines.onnxruntime import Backend
from tokopt.runtime.format.manifest import OWN
from tokopt.runtime.loop import Emission, Request
from tokopt.runtime.rows import RowTimer, reads

STEPS = 8
"""Tokens that are decoded at a time to time a program."""

WRITTEN = 64
"""Tokens that are written after a text, by default, to time a model that speculates."""

TOKENS = 128
"""Tokens of a text after its prompt, by default: where later ones run another program, the time of one is the mean."""

ROWS = (2, 4, 8, 16)
"""New tokens of one text in one call, whose cost is compared with that of one: what checking a draft takes."""


@dataclass(frozen=True)
class TextTimes:
    """One measurement, on a cache that begins empty.

    ``read`` are the seconds for the prompt, ``token`` the mean of those for one token after it, ``rows`` those of one
    call by the number of its new tokens, at the start of a text. ``cache_bytes`` are allocated at the end,
    ``peak_bytes`` are the most that the process ever had in memory, None where the system does not tell.
    """

    read: float
    token: float
    rows: dict[int, float]
    cache_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class TextTimer:
    """What ``batch`` texts take with a prompt of ``prompt`` tokens and ``tokens`` after it; see :class:`TextTimes`."""

    prompt: int
    batch: int = 1
    threads: int | None = None
    backend: Backend = "onnxruntime"
    tokens: int = TOKENS

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
            token, (_, position) = mean_seconds(request, (_likeliest(emission), self.prompt), self.tokens)
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
    """The mean seconds of one of ``tokens`` after ``prompt`` of them.

    The cache goes on growing from one measurement to the next, and is compacted when due.
    """

    prompt: int
    threads: int | None = None
    tokens: int = TOKENS

    def open(self, path: str) -> Callable[[], float]:
        """Open an artifact and read the prompt; raises InputError for one that draws its tokens itself."""
        model = _load(path, self.threads, "onnxruntime")
        ids = (np.arange(self.prompt) % model.settings.vocabulary).tolist()
        request = model.open(1, self.prompt + STEPS)
        state = [(_likeliest(request.prefill([ids])), self.prompt)]

        def measure() -> float:
            seconds, state[0] = mean_seconds(request, state[0], self.tokens)
            return seconds

        return measure


@dataclass(frozen=True)
class WritingTimer:
    """The mean seconds of one of ``tokens`` that a model writes after each of some texts, a text per measurement.

    What a model that speculates takes depends on what it writes, and it learns how many nodes pay, so that texts are
    continued for real, greedily, and past end tokens. ``texts`` are inputs by name, the token ids among them; of their
    first half the last ``prompt`` tokens are read. To a model that verifies a ``drafter`` of the host proposes.
    """

    texts: tuple[Mapping[str, np.ndarray], ...]
    prompt: int
    threads: int | None = None
    tokens: int = WRITTEN
    drafter: str = ""

    def open(self, path: str) -> Callable[[], float]:
        """Open an artifact."""
        model: LanguageModel = load(path, threads=self.threads)
        assert isinstance(model, LanguageModel)
        model.settings = replace(model.settings, eos=())
        names, turns = [tensor.name for tensor in model.interface.inputs], cycle(self.texts)
        drafter = self.drafter if model.manifest.schedule.commit is not None else ""

        def measure() -> float:
            given = dict(next(turns))
            inputs = {name: given.pop(name) for name in names}
            (text,) = given.values()
            ids = np.asarray(text).reshape(-1)
            ids = ids[: max(len(ids) // 2, 1)][-self.prompt :]
            options: Any = {"max_tokens": self.tokens, "inputs": inputs or None, "drafter": drafter or None}
            done = model.generate(ids, **options).statistics
            return done.decode_seconds / max(done.new_tokens - 1, 1)  # the first is read off the prompt

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


State = tuple[np.ndarray, int]
"""The next token of every row [batch], and its position."""


def mean_seconds(request: Request, state: State, tokens: int) -> tuple[float, State]:
    """The seconds of one token, the mean over ``tokens`` of them, and where the text is then.

    Every program that decodes some of them runs for :data:`STEPS`; afterwards the text counts as one that begins.
    """
    seconds = 0.0
    for entry, share in request.schedule.shares(tokens).items():
        request.written = entry.since
        clock = time.perf_counter()
        state = _decode(request, state)
        seconds += share * (time.perf_counter() - clock) / STEPS
    request.written = 0
    return seconds, state


def _decode(request: Request, state: State) -> State:
    """Decode :data:`STEPS` tokens greedily."""
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
