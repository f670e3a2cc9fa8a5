"""The state of a language model between calls: preallocated buffers that ONNX Runtime writes in place."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from tokopt.errors import InputError, TokoptError
from tokopt.runtime.manifest import ProgramEntry, StateEntry

BLOCK = 128
"""Slots that a full cache grows by; a free slot costs attention a little, growing copies the cache."""


class Buffers:
    """One ONNX Runtime value per state, for a batch of rows.

    Axes that are neither the batch nor a number count slots. They grow by free slots, filled with the state's
    initial value, and shrink by dropping slots from the end; the programs never change them.
    """

    def __init__(self, states: Sequence[StateEntry], batch: int, slots: int, device: str = "cpu") -> None:
        self.states = {state.name: state for state in states}
        self.batch, self.slots, self.device = batch, slots, device
        _check_memory(self.bytes_for(slots), batch, slots)
        self.values = {
            name: self._value(_initial(state, batch, slots)) for name, state in self.states.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.bytes_for(self.slots)

    def bytes_for(self, slots: int) -> int:
        """Bytes that ``slots`` slots take."""
        return sum(
            math.prod(_shape(state, self.batch, slots)) * np.dtype(state.dtype).itemsize
            for state in self.states.values()
        )

    def read(self, name: str) -> np.ndarray:
        """A copy of one state."""
        return np.array(self.values[name].numpy())

    def resize(self, slots: int) -> None:
        """Give every slot axis this size; what is cut off must be free."""
        if slots > self.slots:
            _check_memory(self.bytes_for(slots), self.batch, slots)
        for name, state in self.states.items():
            axis = _slot_axis(state)
            if axis is None:
                continue
            old, new = self.values[name].numpy(), _initial(state, self.batch, slots)
            kept = [slice(None)] * new.ndim
            kept[axis] = slice(min(slots, self.slots))
            new[tuple(kept)] = old[tuple(kept)]
            self.values[name] = self._value(new)
        self.slots = slots

    def _value(self, array: np.ndarray) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device)


class Bound:
    """A program whose state stays bound to buffers; what comes and goes with a call is copied."""

    def __init__(self, session: onnxruntime.InferenceSession, entry: ProgramEntry, buffers: Buffers) -> None:
        self.session, self.entry, self.buffers = session, entry, buffers
        self.binding = session.io_binding()
        names = {tensor.name for tensor in entry.inputs}
        self.states = [state for state in buffers.states.values() if state.name in names]
        taken = {state.output for state in self.states}
        self.outputs = [tensor for tensor in entry.outputs if tensor.name not in taken]
        self.spare: dict[str, Any] = {}
        self._results: dict[str, np.ndarray] = {}
        self.bind()

    def bind(self) -> None:
        """Bind the buffers as they are now; to be called after they were resized."""
        self.spare.clear()
        for state in self.states:
            value = self.buffers.values[state.name]
            if not state.in_place:
                self.spare[state.name] = self.buffers._value(np.empty_like(value.numpy()))
            self._bind_state(state)

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call: the state moves on, the other outputs are returned (valid until the next call)."""
        for name, array in feed.items():
            self.binding.bind_cpu_input(name, array)
        results = self._bind_outputs(feed)
        try:
            self.session.run_with_iobinding(self.binding)
        except Exception as error:  # ONNX Runtime raises several unrelated classes
            reason = " ".join(str(error).split())
            raise TokoptError(f"ONNX Runtime failed on inputs that fit: {reason}") from error
        for state in self.states:
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


def _slot_axis(state: StateEntry) -> int | None:
    return next((i for i, a in enumerate(state.axes) if isinstance(a, str) and a != "batch"), None)


def _shape(state: StateEntry, batch: int, slots: int) -> tuple[int, ...]:
    return tuple(a if isinstance(a, int) else batch if a == "batch" else slots for a in state.axes)


def _initial(state: StateEntry, batch: int, slots: int) -> np.ndarray:
    return np.full(_shape(state, batch, slots), state.initial, state.dtype)


def _check_memory(wanted: int, batch: int, slots: int) -> None:
    """Refuse what the machine cannot hold before it is allocated."""
    free = _available_memory()
    if free is not None and wanted > free:
        raise InputError(
            f"a cache of {slots} slots for a batch of {batch} takes {wanted / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB of memory are free; use a smaller batch, a shorter prompt, or an eviction pass"
        )


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
