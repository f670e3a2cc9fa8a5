"""The laws of states: every one is wired, and every slot axis has a count of what is occupied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tokopt.runtime.format.fault import FormatError, require
from tokopt.runtime.format.reader import first_double, short
from tokopt.runtime.format.signature import BATCH, DTYPES, Signature
from tokopt.runtime.format.state import KINDS, Occupancy, State, slot_axis


def check_states(programs: Mapping[str, Signature], states: Sequence[State]) -> None:
    """Every state keeps its laws, alone and with the programs; raises FormatError."""
    if double := first_double(state.name for state in states):
        raise FormatError(f"states has the name {short(double)} twice")
    known = {state.name: state for state in states}
    counted: dict[str, Occupancy] = {}
    for state in states:
        _check_state(state)
        _check_occupancy(state, known, counted)
    wired = {name for where, program in programs.items() for name in _wired(where, program, known)}
    for state in states:
        require(state.name in wired, f"state {short(state.name)} is wired to no program's input or output")


def _check_state(state: State) -> None:
    what = f"state {short(state.name)}"
    require(
        state.kind in KINDS, f"{what} has the kind {short(state.kind)}, it must be one of {', '.join(KINDS)}"
    )
    named = [axis for axis in state.axes if isinstance(axis, str)]
    require(
        len(named) == len(set(named)) and len([axis for axis in named if axis != BATCH]) <= 1,
        f"{what} has more named axes than the batch and one of slots",
    )
    require(
        state.layer is None or state.layer >= 0,
        f"{what} has the layer {state.layer}, it must be 0 or more",
    )
    require(
        _is_representable(state.initial, state.dtype),
        f"{what} starts as {state.initial}, which {short(state.dtype)} cannot represent",
    )
    if state.kind == "length":
        columns = state.axes[1:]
        require(
            state.dtype == "int64"
            and state.axes[:1] == (BATCH,)
            and (not columns or (len(columns) == 1 and isinstance(columns[0], int))),
            f"{what} counts slots and must be int64 [batch] or [batch, columns]",
        )


def _is_representable(value: float, dtype: str) -> bool:
    if dtype not in DTYPES or not np.isfinite(value):
        return False
    if dtype == "bool":
        return value in (0, 1)
    if dtype.startswith(("int", "uint")):
        bounds = np.iinfo(dtype)
        return float(value).is_integer() and bounds.min <= int(value) <= bounds.max
    return abs(value) <= float(np.finfo("float32" if dtype == "bfloat16" else dtype).max)


def _check_occupancy(state: State, known: Mapping[str, State], counted: dict[str, Occupancy]) -> None:
    """``counted`` collects the occupancy of every slot axis."""
    what, axis, occupancy = f"state {short(state.name)}", slot_axis(state.axes), state.occupancy
    require(
        (axis is None) == (occupancy is None),
        f"{what} has {'an occupancy without an axis of slots' if axis is None else 'slots without an occupancy'}",
    )
    if axis is None or occupancy is None:
        return
    length = known.get(occupancy.state)
    if length is None or length.kind != "length":
        raise FormatError(
            f"the occupancy of {what} names {short(occupancy.state)}, which is no state of kind 'length'"
        )
    columns = length.axes[1] if len(length.axes) > 1 else None
    require(
        (columns is None) == (occupancy.column is None)
        and (occupancy.column is None or (isinstance(columns, int) and 0 <= occupancy.column < columns)),
        f"the occupancy of {what} has the column {occupancy.column}, which state {short(length.name)} lacks",
    )
    require(
        counted.setdefault(axis, occupancy) == occupancy,
        f"{what} has another occupancy than other states with the axis {short(axis)}",
    )


def _wired(where: str, program: Signature, known: Mapping[str, State]) -> set[str]:
    """The names of the states that a program reads or writes."""
    wired: set[str] = set()
    for side, tensors in (("inputs", program.inputs), ("outputs", program.outputs)):
        names = [tensor.state for tensor in tensors if tensor.state is not None]
        if double := first_double(names):
            raise FormatError(f"the {side} of program {short(where)} name the state {short(double)} twice")
        for tensor in tensors:
            if tensor.state is None:
                continue
            what, state = f"{short(tensor.name)} of program {short(where)}", known.get(tensor.state)
            if state is None:
                raise FormatError(f"{what} names the state {short(tensor.state)}, which is not there")
            require(
                (tensor.dtype, tuple(tensor.axes)) == (state.dtype, tuple(state.axes)),
                f"{what} has another dtype or other axes than the state {short(state.name)}",
            )
        wired.update(names)
    return wired
