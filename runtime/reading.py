"""How the prompts of a generation are read: by a new request, or by requests that have read the beginnings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tokopt.runtime.loop import Emission, Request


class Reading(Protocol):
    """What a generation asks for once there is something to do."""

    @property
    def held(self) -> Sequence[int]:
        """Of every prompt, how many tokens were read before."""
        ...

    def read(self, prompts: Sequence[Sequence[int]], limit: np.ndarray) -> tuple[Request, Emission]:
        """A request with a row for each prompt, and what follows them.

        ``limit`` [batch] is the most tokens that a row may commit.
        """
        ...


@dataclass(frozen=True)
class Fresh:
    """Reads with a request that ``begin`` makes; each prompt is there ``samples`` times, and is read once."""

    begin: Callable[[], Request]
    batch: int
    samples: int = 1

    @property
    def held(self) -> Sequence[int]:
        """Nothing of any prompt."""
        return (0,) * self.batch

    def read(self, prompts: Sequence[Sequence[int]], limit: np.ndarray) -> tuple[Request, Emission]:
        """Shorter prompts are padded on the left; from then on there is a row for each."""
        request = self.begin()
        emission = request.prefill(prompts[:: self.samples], limit[:: self.samples])
        if self.samples == 1:
            return request, emission
        return request.repeated(self.samples), emission.repeated(self.samples)


@dataclass(frozen=True)
class Going:
    """A request of one row, and how many tokens of the text it has read."""

    request: Request
    read: int


@dataclass(frozen=True)
class Continued:
    """Reads what is new of each text by its own request, and has them go on together if there are several.

    So every text is read as it is alone, in the same parts and without padding. ``drawing`` has a row for each.
    """

    going: Sequence[Going]
    drawing: Mapping[str, np.ndarray] | None

    @property
    def held(self) -> Sequence[int]:
        """What the requests have read."""
        return [one.read for one in self.going]

    def read(self, prompts: Sequence[Sequence[int]], limit: np.ndarray) -> tuple[Request, Emission]:
        """A single request goes on as it is; several are left where they have read their prompts."""
        emissions: list[Emission] = []
        for row, (one, prompt) in enumerate(zip(self.going, prompts, strict=True)):
            at = slice(row, row + 1)
            drawing = None if self.drawing is None else {k: x[at] for k, x in self.drawing.items()}
            emissions.append(one.request.resume(drawing).prefill([prompt[one.read :]], limit[at], one.read))
        if len(self.going) == 1:
            return self.going[0].request, emissions[0]
        request = Request.joined([one.request for one in self.going], self.drawing)
        return request, Emission.joined(emissions)
