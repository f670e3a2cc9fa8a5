"""The state of a language model between calls: preallocated buffers that ONNX Runtime writes in place."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from tokopt.errors import InputError, TokoptError
from tokopt.runtime.format.manifest import ProgramEntry, StateEntry

BLOCK = 16
"""Slots that a small cache grows by; larger ones grow by a sixteenth."""


def capacity(slots: int) -> int:
    """Slots to allocate for so many: a free slot costs attention a little, growing copies the cache."""
    block = max(BLOCK, 1 << max(slots.bit_length() - 5, 0))
    return -(-slots // block) * block


class Buffers:
    """One ONNX Runtime value per state, for a batch of rows.

    Axes that are neither the batch nor a number count slots: one for all layers, or one per layer. They grow by
    free slots, filled with the state's initial value, and shrink by dropping slots from the end; the programs
    never change them.
    """

    def __init__(self, states: Sequence[StateEntry], batch: int, slots: int, device: str = "cpu") -> None:
        self.states = {state.name: state for state in states}
        axes = [slot_axis(state.axes) for state in states]
        self.slots = self.fitting({axis: slots for axis in axes if axis is not None})
        self.batch, self.device = batch, device
        self._check_memory(self.slots)
        self.values = {name: self._value(self._initial(s, self.slots)) for name, s in self.states.items()}

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.bytes_for(self.slots)

    def bytes_for(self, slots: Mapping[str, int]) -> int:
        """Bytes that so many slots take, by axis."""
        sizes = [(self._shape(state, slots), np.dtype(state.dtype)) for state in self.states.values()]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in sizes)

    def read(self, name: str) -> np.ndarray:
        """A copy of one state."""
        return np.array(self.values[name].numpy())

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
        self.slots = dict(slots)

    def advance(self, session: Any) -> None:
        """Run a program of nothing but state (``compact``): every state becomes its next value, in new memory."""
        inputs = {given.name for given in session.get_inputs()}
        states = [state for state in self.states.values() if state.name in inputs]
        feed = {state.name: self.values[state.name] for state in states}
        results = run_checked(session.run_with_ort_values, [state.output for state in states], feed)
        self.values.update(zip((state.name for state in states), results, strict=True))

    def _shape(self, state: StateEntry, slots: Mapping[str, int]) -> tuple[int, ...]:
        sizes = {"batch": self.batch, **slots}
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in state.axes)

    def _initial(self, state: StateEntry, slots: Mapping[str, int]) -> np.ndarray:
        return np.full(self._shape(state, slots), state.initial, state.dtype)

    def _check_memory(self, slots: Mapping[str, int]) -> None:
        """Refuse what the machine cannot hold before it is allocated."""
        wanted, free = self.bytes_for(slots), self._free_bytes()
        if free is not None and wanted > free:
            raise InputError(
                f"a cache of {max(slots.values())} slots for a batch of {self.batch} takes "
                f"{wanted / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are free; use a smaller batch, a "
                "shorter prompt, or an eviction pass"
            )

    def _free_bytes(self) -> int | None:
        return _available_memory()

    def _value(self, array: np.ndarray) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device)


class Bound:
    """A program whose state stays bound to buffers; what comes and goes with a call is copied."""

    def __init__(self, session: onnxruntime.InferenceSession, entry: ProgramEntry, buffers: Buffers) -> None:
        self.session, self.entry, self.buffers = session, entry, buffers
        self.binding = session.io_binding()
        names = {tensor.name for tensor in entry.inputs}
        self.states = [state for state in buffers.states.values() if state.name in names]
        made = {tensor.name for tensor in entry.outputs}
        self.written = [state for state in self.states if state.output in made]
        taken = {state.output for state in self.written}
        self.outputs = [tensor for tensor in entry.outputs if tensor.name not in taken]
        self.spare: dict[str, Any] = {}
        self._results: dict[str, np.ndarray] = {}
        self.bind()

    def bind(self) -> None:
        """Bind the buffers as they are now; to be called after they were resized."""
        self.spare.clear()
        for state in self.states:
            self.binding.bind_ortvalue_input(state.name, self.buffers.values[state.name])
        for state in self.written:
            if not state.in_place:
                value = self.buffers.values[state.name]
                self.spare[state.name] = self.buffers._value(np.empty_like(value.numpy()))
            self._bind_state(state)

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call: the state moves on, the other outputs are returned (valid until the next call)."""
        for name, array in feed.items():
            self.binding.bind_cpu_input(name, array)
        results = self._bind_outputs(feed)
        run_checked(self.session.run_with_iobinding, self.binding)
        for state in self.written:
            if not state.in_place:
                value = self.buffers.values[state.name]
                self.buffers.values[state.name], self.spare[state.name] = self.spare[state.name], value
                self._bind_state(state)
        return results

    def _bind_state(self, state: StateEntry) -> None:
        value = self.buffers.values[state.name]
        self.binding.bind_ortvalue_input(state.name, value)
        self.binding.bind_ortvalue_output(state.output, self.spare.get(state.name, value))

    def _bind_outputs(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays that the call writes its results to, kept while their sizes stay the same."""
        sizes = {
            axis: size
            for tensor in self.entry.inputs
            if tensor.name in feed
            for axis, size in zip(tensor.axes, feed[tensor.name].shape, strict=True)
        }
        for tensor in self.outputs:
            shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.axes)
            known = self._results.get(tensor.name)
            if known is None or known.shape != shape:
                known = self._results[tensor.name] = np.empty(shape, tensor.dtype)
                self.binding.bind_ortvalue_output(
                    tensor.name, onnxruntime.OrtValue.ortvalue_from_numpy(known)
                )
        return self._results


def run_in_place(
    session: onnxruntime.InferenceSession,
    outputs: Sequence[str],
    feed: Mapping[str, np.ndarray],
    shared: Mapping[str, str],
) -> list[np.ndarray]:
    """One call on arrays, with some outputs written into copies of inputs (``{output: input}``).

    A program that writes its cache in place says nothing about the rest of a cache that is not the same buffer.
    """
    binding = session.io_binding()
    copies = {
        output: onnxruntime.OrtValue.ortvalue_from_numpy(np.array(feed[name]))
        for output, name in shared.items()
    }
    owner = {name: output for output, name in shared.items()}
    for name, array in feed.items():
        if name in owner:
            binding.bind_ortvalue_input(name, copies[owner[name]])
        else:
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
    for output in outputs:
        if output in copies:
            binding.bind_ortvalue_output(output, copies[output])
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


def slot_axis(axes: Sequence[str | int]) -> str | None:
    """Which axis of a state counts slots; None for a state without one."""
    return next((axis for axis in axes if isinstance(axis, str) and axis != "batch"), None)


def _available_memory() -> int | None:
    """Bytes that can be allocated without swapping, where the system tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        pages = getattr(os, "sysconf", lambda name: -1)
        try:
            return max(pages("SC_AVPHYS_PAGES"), 0) * pages("SC_PAGE_SIZE") or None
        except (ValueError, OSError):
            return None
