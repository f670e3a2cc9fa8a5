"""A tensor that a host keeps between calls and feeds back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokopt.runtime.format.signature import BATCH, Axis

KINDS = (
    *("length", "position", "key", "value", "scale", "zero", "score"),
    *("shift", "budget", "table", "history", "counter", "memory"),
)


@dataclass(frozen=True)
class Occupancy:
    """Where the number of occupied slots stands: a state of kind ``"length"``, and of [batch, columns] the column."""

    state: str
    column: int | None = None


@dataclass(frozen=True)
class State:
    """A tensor that programs read and write, with ``initial`` in every entry at the start of a request.

    ``kind`` says what it holds: ``"length"`` ([batch] or [batch, columns] occupied slots), ``"position"`` (of the token
    in each slot), ``"key"``, ``"value"``, ``"scale"``, ``"zero"``, ``"score"``, ``"shift"`` (of positions after a
    renumbering), ``"budget"``, ``"table"``, ``"history"``, ``"counter"`` or ``"memory"``. ``layer`` is the index of the
    layer that it belongs to. The one named axis that is not the batch counts slots; ``occupancy`` says how many of them
    hold something, and is there for every state with such an axis.
    """

    name: str
    kind: str
    dtype: str
    axes: tuple[Axis, ...]
    initial: float = 0.0
    layer: int | None = None
    occupancy: Occupancy | None = None


def slot_axis(axes: Sequence[Axis]) -> str | None:
    """Which axis of a state counts slots; None for a state without one."""
    return next((axis for axis in axes if isinstance(axis, str) and axis != BATCH), None)
