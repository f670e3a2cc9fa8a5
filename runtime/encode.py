"""The programs that run once per request: in their order, on the rows that have not left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tokopt.errors import TokoptError
from tokopt.runtime.engines.base import Programs
from tokopt.runtime.format.link import Link, Port
from tokopt.runtime.format.manifest import Manifest, ProgramEntry
from tokopt.runtime.format.schedule import Entry
from tokopt.runtime.format.signature import BATCH, find_role, wiring, with_role
from tokopt.runtime.format.state import State, slot_axis

Arrays = dict[str, np.ndarray]


@dataclass
class Encoded:
    """What the programs made of a request: arrays for the caller, values of links by target, and states.

    ``depths`` [batch] int64 says after how many of the model's blocks each row left; None where blocks are not counted.
    """

    outputs: Arrays = field(default_factory=dict[str, np.ndarray])
    links: dict[Port, np.ndarray] = field(default_factory=dict[Port, np.ndarray])
    states: Arrays = field(default_factory=dict[str, np.ndarray])
    depths: np.ndarray | None = None


def encode(
    manifest: Manifest,
    programs: Programs,
    inputs: Mapping[str, np.ndarray],
    batch: int,
    depth: int | None = None,
) -> Encoded:
    """Run every entry of role ``"encode"`` on the caller's arrays.

    Where a program says which rows are done, these leave with its outputs, and the others go on alone. With a
    ``depth``, one of :func:`exit_depths`, no row leaves before, and all leave there. Raises what the engine raises, and
    TokoptError when the outputs of rows that left differ in size from the others'.
    """
    return _Encoding(manifest, programs, inputs, batch).run(depth)


def exit_depths(manifest: Manifest) -> tuple[int, ...]:
    """The depths at which a model gives its outputs: those of the programs after which rows leave, and the last."""
    entries = tuple(manifest.schedule.of_role("encode"))
    return tuple(
        entry.depth
        for entry in entries
        if entry.depth
        and (entry is entries[-1] or find_role(manifest.programs[entry.program].outputs, "done") is not None)
    )


class _Encoding:
    """The rows that are still on their way: their indices, and everything that has a row for each."""

    def __init__(
        self, manifest: Manifest, programs: Programs, inputs: Mapping[str, np.ndarray], batch: int
    ) -> None:
        self.manifest, self.programs, self.batch = manifest, programs, batch
        self.inputs, self.made = dict(inputs), Encoded()
        self.states = HostStates(manifest.states)
        self.rows = np.arange(batch)
        self.depths = np.zeros(batch, np.int64)
        self.left: list[tuple[np.ndarray, Arrays]] = []

    def run(self, depth: int | None) -> Encoded:
        for entry in self.manifest.schedule.of_role("encode"):
            program = self.manifest.programs[entry.program]
            results = self._call(entry, program)
            outputs = {tensor.name: results[tensor.name] for tensor in with_role(program.outputs, "output")}
            done = find_role(program.outputs, "done")
            if entry.depth:
                self.depths[self.rows] = entry.depth
            if done is None or entry.depth == depth:
                self.made.outputs.update(outputs)
                if entry.depth == depth:
                    break
            elif depth is None and not self._leave(results[done.name], outputs):
                break
        if self.left:
            self.made.outputs = self._together()
        self.made.states = self.states.values
        self.made.depths = self.depths if self.depths.all() else None
        return self.made

    def _call(self, entry: Entry, program: ProgramEntry) -> Arrays:
        feed = {tensor.name: self.inputs[tensor.name] for tensor in with_role(program.inputs, "input")}
        for tensor in with_role(program.inputs, "link"):
            feed[tensor.name] = self.made.links[Port(entry.program, tensor.name)]
        self.states.reserve(needed_slots(entry, program, feed), len(self.rows), program)
        feed |= {name: self.states.values[state] for name, state in wiring(program.inputs).items()}
        results = self.programs.run(entry.program, feed)
        for name, state in wiring(program.outputs).items():
            self.states.put(state, results[name])
        carry(self.manifest.links, entry.program, results, self.made.links)
        return results

    def _leave(self, done: np.ndarray, outputs: Arrays) -> bool:
        """Set the rows that are done aside with their outputs; whether others go on."""
        if not done.any():
            return True
        self.left.append((self.rows[done], {name: array[done] for name, array in outputs.items()}))
        stay = ~done
        self.rows = self.rows[stay]
        if not len(self.rows):
            return False
        axes = {t.name: t.axes for p in self.manifest.programs.values() for t in with_role(p.inputs, "input")}
        self.inputs = {
            name: np.compress(stay, array, axes[name].index(BATCH)) if BATCH in axes[name] else array
            for name, array in self.inputs.items()
        }
        self.made.links = {port: array[stay] for port, array in self.made.links.items()}
        self.states.pack(stay)
        return True

    def _together(self) -> Arrays:
        """The outputs of all rows, each in its place."""
        parts = [*self.left, (self.rows, self.made.outputs)] if len(self.rows) else self.left
        order = np.argsort(np.concatenate([rows for rows, _ in parts]))
        names = parts[0][1]
        try:
            return {name: np.concatenate([part[name] for _, part in parts])[order] for name in names}
        except ValueError as error:
            raise TokoptError(
                f"the outputs of rows that left early differ in size from the others': {error}"
            ) from error


class HostStates:
    """States as arrays of the host, made when a program first uses them."""

    def __init__(self, states: Sequence[State]) -> None:
        self.known = {state.name: state for state in states}
        self.values: Arrays = {}
        self._slots: dict[str, int] = {}

    def reserve(self, slots: int, batch: int, program: ProgramEntry) -> None:
        """Have the states of a program, with so many free slots on every slot axis."""
        used = set(wiring((*program.inputs, *program.outputs)).values())
        names = {*self.values, *used, *(o.state for name in used if (o := self.known[name].occupancy))}
        sizes = {BATCH: batch}
        for name in names:
            axis = slot_axis(self.known[name].axes)
            if axis is not None:
                sizes[axis] = max(self._slots.get(axis, 1), self._occupied(self.known[name]) + slots)
        for name in names:
            self._resize(self.known[name], sizes)
        self._slots |= {axis: size for axis, size in sizes.items() if axis != BATCH}

    def put(self, name: str, array: np.ndarray) -> None:
        """Take a state's next value, which may have more slots when its program did not read the old one."""
        self.values[name] = array
        axes = self.known[name].axes
        axis = slot_axis(axes)
        if axis is not None:
            self._slots[axis] = max(self._slots.get(axis, 1), array.shape[axes.index(axis)])

    def pack(self, stay: np.ndarray) -> None:
        """Keep these rows alone."""
        for name, array in self.values.items():
            axes = self.known[name].axes
            if BATCH in axes:
                self.values[name] = np.compress(stay, array, axes.index(BATCH))

    def _occupied(self, state: State) -> int:
        assert state.occupancy is not None
        lengths, column = self.values.get(state.occupancy.state), state.occupancy.column
        if lengths is None:
            return max(int(self.known[state.occupancy.state].initial), 0)
        return int((lengths if column is None else lengths[:, column]).max())

    def _resize(self, state: State, sizes: Mapping[str, int]) -> None:
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in state.axes)
        old = self.values.get(state.name)
        if old is not None and old.shape == shape:
            return
        self.values[state.name] = np.full(shape, state.initial, state.dtype)
        if old is not None:
            self.values[state.name][tuple(map(slice, old.shape))] = old


def needed_slots(entry: Entry, program: ProgramEntry, feed: Mapping[str, np.ndarray]) -> int:
    """Free slots that a call of an entry needs, of which the axis of an input may be the number."""
    if isinstance(entry.slots, int):
        return entry.slots
    sizes = (
        feed[t.name].shape[t.axes.index(entry.slots)]
        for t in program.inputs
        if t.name in feed and entry.slots in t.axes
    )
    return next(sizes)


def carry(
    links: Iterable[Link], program: str, results: Mapping[str, np.ndarray], values: dict[Port, np.ndarray]
) -> None:
    """Keep what a program has made for others."""
    for link in links:
        if link.source.program == program:
            values[link.target] = results[link.source.name]
