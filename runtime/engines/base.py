"""What an engine offers to the loop, whichever it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from tokopt.runtime.engines.kernels import Kernels
from tokopt.runtime.format.manifest import PORTABLE


class Programs(Protocol):
    """The programs of an artifact on one engine, opened when first asked for."""

    @property
    def kernels(self) -> Kernels:
        """What is used of tokopt's own CPU kernels."""
        ...

    def forms(self, program: str) -> tuple[str, ...]:
        """The forms of a program that are executed here."""
        ...

    def get(self, program: str, form: str = PORTABLE) -> Any:
        """One form of a program, opened."""
        ...

    def best(self, program: str, batch: int) -> Any:
        """The fastest form for so many rows, opened."""
        ...

    def run(
        self, program: str, feed: Mapping[str, np.ndarray], form: str | None = None
    ) -> dict[str, np.ndarray]:
        """The outputs of a program for arrays, states among them; by default of the fastest form for any inputs."""
        ...

    def in_float(self) -> Programs | None:
        """The same programs with quantized weights multiplied in float32; None where the engine cannot do that."""
        ...


class Stateful(Programs, Protocol):
    """Programs whose states stay in the engine's memory between calls."""

    def buffers(self, batch: int, slots: int) -> Any:
        """The initial states, a :class:`.Buffers`."""
        ...

    def check_reading(self, batch: int, tokens: int, slots: int) -> None:
        """Raise InputError when a call that reads so many tokens of every row does not fit into memory."""
        ...

    def bind(self, program: str, buffers: Any) -> Any:
        """A program whose states stay in ``buffers``."""
        ...
