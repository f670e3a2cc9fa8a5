"""The state of a language model between calls: preallocated buffers that ONNX Runtime writes in place."""

# ONNX Runtime is untyped.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from tokopt.errors import InputError, TokoptError
from tokopt.runtime.format.manifest import ProgramEntry
from tokopt.runtime.format.signature import BATCH, Tensor, wiring
from tokopt.runtime.format.state import State, slot_axis

BLOCK = 64
"""Slots that a small cache grows by; larger ones grow by a sixteenth."""


def capacity(slots: int) -> int:
    """Slots to allocate for so many: a free slot costs attention a little, growing copies the cache."""
    block = max(BLOCK, 1 << max(slots.bit_length() - 5, 0))
    return -(-slots // block) * block


class Buffers:
    """One ONNX Runtime value per state, for a batch of rows.

    Slot axes grow by free slots, filled with the state's initial value, and shrink by dropping slots from the end; the
    programs never change their sizes. ``nbytes`` are allocated.
    """

    def __init__(self, states: Sequence[State], batch: int, slots: int, device: str = "cpu") -> None:
        """``slots`` are those that are needed at first; there are some more."""
        self.states = {state.name: state for state in states}
        axes = [slot_axis(state.axes) for state in states]
        self.slots = self.fitting(self.roomy({axis: slots for axis in axes if axis is not None}))
        self.batch, self.device = batch, device
        self._check_memory(self.slots)
        self.nbytes = self.bytes_for(self.slots)
        self.values = {name: self._value(self._initial(s, self.slots)) for name, s in self.states.items()}

    def bytes_for(self, slots: Mapping[str, int]) -> int:
        """Bytes that so many slots take, by axis."""
        sizes = [(self._shape(state, slots), np.dtype(state.dtype)) for state in self.states.values()]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in sizes)

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        """A copy of one state, whole or of one row: as the state of a batch of one."""
        array, axes = self.values[name].numpy(), self.states[name].axes
        if row is not None and BATCH in axes:
            return array.take([row], axes.index(BATCH))
        return np.array(array)

    def occupied(self, row: int | None = None) -> dict[str, int]:
        """The most slots that a row occupies, or those of one row, by slot axis."""
        found: dict[str, int] = {}
        for state in self.states.values():
            axis = slot_axis(state.axes)
            if axis is not None and axis not in found:
                assert state.occupancy is not None
                lengths = self.read(state.occupancy.state, row)
                column = state.occupancy.column
                found[axis] = int((lengths if column is None else lengths[:, column]).max())
        return found

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over states from arrays; an axis with more slots there grows."""
        slots = dict(self.slots)
        for name, array in arrays.items():
            axis = slot_axis(self.states[name].axes)
            if axis is not None:
                slots[axis] = max(slots[axis], array.shape[self.states[name].axes.index(axis)])
        self.resize(slots)
        for name, array in arrays.items():
            new = self._initial(self.states[name], self.slots)
            new[tuple(map(slice, array.shape))] = array
            self.values[name] = self._value(new)

    def roomy(self, slots: Mapping[str, int]) -> dict[str, int]:
        """The sizes to allocate where so many slots are needed by axis, so that growing is rare."""
        return {axis: capacity(count) for axis, count in slots.items()}

    def fitting(self, slots: Mapping[str, int]) -> dict[str, int]:
        """The sizes to allocate for at least so many slots by axis."""
        return dict(slots)

    def resize(self, slots: Mapping[str, int]) -> None:
        """Give every slot axis its size; what is cut off must be free."""
        slots = self.fitting(slots)
        if any(slots[axis] > size for axis, size in self.slots.items()):
            self._check_memory(slots)
        for name, state in self.states.items():
            axis = slot_axis(state.axes)
            if axis is None or slots[axis] == self.slots[axis]:
                continue
            old, new = self.values[name].numpy(), self._initial(state, slots)
            kept = [slice(None)] * new.ndim
            kept[state.axes.index(axis)] = slice(min(slots[axis], self.slots[axis]))
            new[tuple(kept)] = old[tuple(kept)]
            self.values[name] = self._value(new)
        self.slots, self.nbytes = dict(slots), self.bytes_for(slots)

    def advance(self, session: Any, entry: ProgramEntry, feed: Mapping[str, np.ndarray]) -> None:
        """Run a program of nothing but states and ``feed``; what it does not write in place is in new memory."""
        binding = session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for name, state in wiring(entry.inputs).items():
            binding.bind_ortvalue_input(name, self.values[state])
        shared = shared_states(entry)
        for tensor in entry.outputs:
            if tensor.name in shared:
                binding.bind_ortvalue_output(tensor.name, self.values[shared[tensor.name]])
            else:
                binding.bind_output(tensor.name, self.device)
        run_checked(session.run_with_iobinding, binding)
        made = dict(zip((tensor.name for tensor in entry.outputs), binding.get_outputs(), strict=True))
        for name, state in wiring(entry.outputs).items():
            self.values[state] = made[name]

    def like(self, value: Any) -> Any:
        """New memory of the size of a value."""
        return self._value(np.empty_like(value.numpy()))

    def _shape(self, state: State, slots: Mapping[str, int]) -> tuple[int, ...]:
        sizes = {BATCH: self.batch, **slots}
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in state.axes)

    def _initial(self, state: State, slots: Mapping[str, int]) -> np.ndarray:
        return np.full(self._shape(state, slots), state.initial, state.dtype)

    def _check_memory(self, slots: Mapping[str, int]) -> None:
        """Refuse what the machine cannot hold before it is allocated."""
        wanted, free = self.bytes_for(slots), self._free_bytes()
        if free is not None and wanted > free:
            raise InputError(
                f"a cache of {max(slots.values(), default=0)} slots for a batch of {self.batch} takes "
                f"{wanted / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are free; use a smaller batch, a "
                "shorter prompt, or an eviction pass"
            )

    def _free_bytes(self) -> int | None:
        return available_memory()

    def _value(self, array: np.ndarray) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device)


def check_reading(states: Sequence[State], batch: int, tokens: int, slots: int) -> None:
    """Refuse to read so many tokens of every row in one call when their attention does not fit into memory.

    For each pair of a token and a slot the portable form holds at least a mask, twice in bytes and once in floats, and
    for every head a score before and after softmax. A single row is read by a fused kernel, which holds less. Raises
    InputError.
    """
    keys = [state.axes[1] for state in states if state.kind == "key"]
    heads = max((axis for axis in keys if isinstance(axis, int)), default=0)
    wanted, free = batch * tokens * slots * (6 + 8 * heads), available_memory()
    if batch > 1 and free is not None and wanted > free:
        raise InputError(
            f"attention of {tokens} tokens to {slots} slots for a batch of {batch} takes {wanted / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB of memory are free; use a smaller batch"
        )


class Bound:
    """A program whose states stay bound to buffers; what comes and goes with a call is copied."""

    def __init__(self, session: Any, entry: ProgramEntry, buffers: Buffers) -> None:
        self.session, self.entry, self.buffers = session, entry, buffers
        self.binding: Any = session.io_binding()
        self.shared = shared_states(entry)
        self.read = wiring(entry.inputs)
        self._reader = {state: name for name, state in self.read.items()}
        self.moved = {n: state for n, state in wiring(entry.outputs).items() if n not in self.shared}
        self.returned = [t for t in entry.outputs if t.name not in self.shared and t.name not in self.moved]
        self.spare: dict[str, Any] = {}
        self._read: dict[str, Any] = {}
        self._results: dict[str, np.ndarray] = {}
        self._places: list[str] = []
        self._fed = [tensor for tensor in entry.inputs if tensor.state is None]
        self._sizes: dict[str, int] = {}
        self.bind()

    def bind(self) -> None:
        """Bind the buffers as they are now; to be called after they were resized."""
        values = self.buffers.values
        self.spare.clear()
        for name, state in self.read.items():
            self._bind_input(name, state)
        for name, state in self.shared.items():
            self._bind_output(name, values[state])
        for name, state in self.moved.items():
            self.spare[name] = self.buffers.like(values[state])
            self._bind_output(name, self.spare[name])

    def follow(self) -> None:
        """Bind states that another program left in other memory of the same size."""
        values = self.buffers.values
        for name, state in self.read.items():
            if values[state] is not self._read[state]:
                self._bind_input(name, state)
        for name, state in self.shared.items():
            self.binding.bind_ortvalue_output(name, values[state])

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call: the states move on, the other outputs are returned (valid until the next call)."""
        for name, array in feed.items():
            self.binding.bind_cpu_input(name, array)
        unknown = self._bind_returned(feed)
        run_checked(self.session.run_with_iobinding, self.binding)
        self._swap()
        if not unknown:
            return self._results
        made = self.binding.get_outputs()
        return self._results | {name: made[self._places.index(name)].numpy() for name in unknown}

    def _swap(self) -> None:
        """What was written beside the buffers is the state now, and the buffers are written next."""
        values = self.buffers.values
        for name, state in self.moved.items():
            values[state], self.spare[name] = self.spare[name], values[state]
            self.binding.bind_ortvalue_output(name, self.spare[name])
            if state in self._reader:
                self._bind_input(self._reader[state], state)

    def _bind_input(self, name: str, state: str) -> None:
        value = self._read[state] = self.buffers.values[state]
        self.binding.bind_ortvalue_input(name, value)

    def _bind_output(self, name: str, value: Any) -> None:
        self.binding.bind_ortvalue_output(name, value)
        self._place(name)

    def _place(self, name: str) -> None:
        """ONNX Runtime lists outputs in the order in which they were first bound."""
        if name not in self._places:
            self._places.append(name)

    def _bind_returned(self, feed: Mapping[str, np.ndarray]) -> list[str]:
        """Have arrays that the call writes to, kept while their sizes stay the same; the outputs of unknown size."""
        sizes = {BATCH: self.buffers.batch, **self.buffers.slots, **axis_sizes(self._fed, feed)}
        if sizes == self._sizes:
            return []
        unknown: list[str] = []
        for tensor in self.returned:
            if not all(isinstance(axis, int) or axis in sizes for axis in tensor.axes):
                self.binding.bind_output(tensor.name)
                self._place(tensor.name)
                unknown.append(tensor.name)
                continue
            shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.axes)
            known = self._results.get(tensor.name)
            if known is None or known.shape != shape:
                known = self._results[tensor.name] = np.empty(shape, tensor.dtype)
                self._bind_output(tensor.name, onnxruntime.OrtValue.ortvalue_from_numpy(known))
        self._sizes = {} if unknown else sizes
        return unknown


def shared_states(entry: ProgramEntry) -> dict[str, str]:
    """The state whose buffer an output is written into, by the output's name."""
    states = wiring(entry.inputs)
    return {output: states[given] for output, given in entry.aliases.items()}


def axis_sizes(inputs: Sequence[Tensor], feed: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The size of every named axis of the inputs that are fed."""
    return {
        axis: size
        for tensor in inputs
        if tensor.name in feed
        for axis, size in zip(tensor.axes, feed[tensor.name].shape, strict=True)
        if isinstance(axis, str)
    }


def run_in_place(
    session: Any,
    outputs: Sequence[str],
    feed: Mapping[str, np.ndarray],
    shared: Mapping[str, str],
) -> list[np.ndarray]:
    """One call on arrays, with some outputs written into copies of inputs (``{output: input}``).

    A program that writes its cache in place says nothing about the rest of a cache that is not the same buffer.
    """
    binding = session.io_binding()
    copies = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.array(feed[name]))
        for name in dict.fromkeys(shared.values())
    }
    for name, array in feed.items():
        if name in copies:
            binding.bind_ortvalue_input(name, copies[name])
        else:
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
    for output in outputs:
        if output in shared:
            binding.bind_ortvalue_output(output, copies[shared[output]])
        else:
            binding.bind_output(output)
    session.run_with_iobinding(binding)
    return [np.asarray(value) for value in binding.copy_outputs_to_cpu()]


def run_checked(run: Callable[..., Any], *arguments: object) -> Any:
    """Call a method of a session; what ONNX Runtime raises becomes a TokoptError."""
    try:
        return run(*arguments)
    except Exception as error:  # ONNX Runtime raises several unrelated classes
        reason = " ".join(str(error).split())
        raise TokoptError(f"ONNX Runtime failed on inputs that fit: {reason}") from error


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, where the system tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        if not hasattr(os, "sysconf"):  # Windows
            return None
        try:
            return max(os.sysconf("SC_AVPHYS_PAGES"), 0) * os.sysconf("SC_PAGE_SIZE") or None
        except (ValueError, OSError):
            return None
