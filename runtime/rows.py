"""What a call of a language model costs by the number of new tokens in it: the curve that speculation plans with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from tokopt.arguments import LARGEST, check_integer, check_items
from tokopt.errors import InputError
from tokopt.runtime.buffers import Bound
from tokopt.runtime.format.signature import find_role
from tokopt.runtime.language import LanguageModel
from tokopt.runtime.machine import describe_machine

ROWS = (1, 2, 4, 8, 16, 32)
"""Numbers of new tokens that are measured."""

PROMPT, TURNS = 64, 9


@dataclass(frozen=True)
class RowCosts:
    """The median seconds of a call by the number of its new tokens, and the machine that took them."""

    seconds: Mapping[int, float]
    machine: Mapping[str, object]

    @classmethod
    def of(cls, turns: Sequence[Mapping[int, float]], machine: Mapping[str, object]) -> RowCosts:
        """The medians over turns, each of which timed the same numbers of new tokens."""
        return cls({count: median(turn[count] for turn in turns) for count in turns[0]}, machine)

    def ratio(self, rows: int) -> float:
        """What a call with so many new tokens costs, in calls with the fewest that were measured."""
        return self.seconds[rows] / self.seconds[min(self.seconds)]


def measure_rows(
    model: LanguageModel,
    rows: Sequence[int] = ROWS,
    *,
    prompt: int = PROMPT,
    turns: int = TURNS,
    threads: int | None = None,
) -> RowCosts:
    """Time one text's calls with these numbers of new tokens after ``prompt`` tokens, in turns.

    Numbers that the model does not take in one call are left out. ``threads`` is what the model was loaded with, for
    the description of the machine. Raises InputError for a model that draws its tokens itself, and when no number is
    left.
    """
    turns = check_integer("turns", turns, 1, LARGEST)
    measure = RowTimer(model, rows, prompt).measure
    measure()  # the first turn allocates
    found = [measure() for _ in range(turns)]
    return RowCosts.of(found, describe_machine(threads))


class RowTimer:
    """Times a model's calls on one text, each from the same state: that after the prompt.

    Every new token's logits are computed, as for checking a draft.
    """

    def __init__(
        self, model: LanguageModel, rows: Sequence[int], prompt: int, form: str | None = None
    ) -> None:
        """``form`` is a form of the program that decodes, by default the fastest."""
        counts = [
            check_integer("an item of rows", count, 1, LARGEST) for count in check_items("rows", rows, _TAKES)
        ]
        prompt = check_integer("prompt", prompt, 1, LARGEST)
        if model.draws:
            raise InputError(
                f"{model.path} draws its tokens itself, so a token of it has no time of its own; time generate"
            )
        self.counts = [count for count in counts if reads(model, count)]
        if not self.counts:
            raise InputError(
                f"{model.path} takes none of {', '.join(map(str, counts))} new tokens in one call"
            )
        self.prompt = prompt
        self.request = model.open(1, prompt + max(self.counts))
        ids = (np.arange(prompt) % model.settings.vocabulary).tolist()
        self.request.prefill([ids])
        self.entry = self.request.entry("decode")
        if form is not None:
            self._bind(model, form)
        self._states = {name: self.request.buffers.read(name) for name in self.request.buffers.states}
        self._used = dict(self.request.used)

    def _bind(self, model: LanguageModel, form: str) -> None:
        for name in self.entry.programs:
            session = model.sessions.get(name, form)
            bound = Bound(session, model.manifest.programs[name], self.request.buffers)
            self.request.bind(name, bound)

    def measure(self) -> dict[int, float]:
        """The seconds of one call for each number of new tokens.

        What ran before leaves threads that still spin and caches that hold other weights: one call goes first.
        """
        self._call(max(self.counts))
        return {count: self._time(count) for count in self.counts}

    def _time(self, count: int) -> float:
        """The second of two equal calls: the first finds caches cold and allocates its results."""
        self._call(count)
        return self._call(count)

    def _call(self, count: int) -> float:
        request = self.request
        request.buffers.load(self._states)
        request.used = dict(self._used)
        if request.program is not None:
            request.program.bind()
        rows = np.arange(count)
        tokens, positions = np.zeros((1, count), np.int64), (self.prompt + rows)[None]
        clock = time.perf_counter()
        request.emit(self.entry, tokens, positions, rows)
        return time.perf_counter() - clock


_TAKES = "a list of numbers of new tokens, as in [1, 2, 4, 8]"


def reads(model: LanguageModel, count: int) -> bool:
    """Whether one call of the program that decodes takes so many new tokens."""
    entry = model.manifest.schedule.entry("decode")
    assert entry is not None
    program = model.manifest.programs[entry.program]
    tokens = find_role(program.inputs, "tokens")
    axis = None if tokens is None else tokens.axes[1]
    most = program.ranges[axis].max if isinstance(axis, str) else 1
    return most is None or count <= most
