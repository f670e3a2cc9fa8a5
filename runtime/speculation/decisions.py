"""Where the randomness of drafting and verifying comes from: one decision, one uniform number."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokopt.errors import InputError

Floats = NDArray[np.float64]


class Decisions(Protocol):
    """A source of decisions."""

    def bernoulli(self, probability: float) -> bool:
        """True with this probability."""
        ...

    def draw(self, distribution: Floats) -> int:
        """A token of a distribution [vocabulary] that sums to 1."""
        ...


class Uniforms:
    """Decisions from uniform numbers [decisions] in [0, 1), in order; ``used`` says how many were taken.

    They are a row's of :func:`tokopt.runtime.threefry.uniforms`, from its counter on. Every decision takes one, also
    where its outcome is certain. Verifying a tree takes at most as many as it has nodes, drawing its tokens one less.
    """

    def __init__(self, uniforms: NDArray[np.floating]) -> None:
        self._uniforms = np.asarray(uniforms, np.float64)
        inside = (self._uniforms >= 0) & (self._uniforms < 1)
        if self._uniforms.ndim != 1 or not inside.all():
            raise InputError("uniforms must be an array [decisions] of numbers from 0 to below 1")
        self.used = 0

    def bernoulli(self, probability: float) -> bool:
        """True where the next number is below ``probability``."""
        return self._next() < probability

    def draw(self, distribution: Floats) -> int:
        """The token where the cumulative sum of ``distribution`` passes the next number."""
        total: Floats = np.cumsum(distribution)
        # The largest number below 1 times the sum rounds to less than the sum, so that the search finds a token.
        return int(np.searchsorted(total, self._next() * float(total[-1]), side="right"))

    def _next(self) -> float:
        if self.used == len(self._uniforms):
            raise InputError(f"all {self.used} uniforms are used; give one for every decision")
        self.used += 1
        return float(self._uniforms[self.used - 1])
