"""Formats 1 and 2, whose names and flags said what states, links and the schedule of a manifest say now.

An encoder had the program ``forward``. A language model had ``step`` and, when a pass evicted, ``compact``, which ran
after the prompt and then every ``compact_every`` tokens. What a state held, its layer, and which state counted its
slots stood in the spelling of its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tokopt.runtime.format.entries import (
    FORMAT_VERSION,
    Manifest,
    ProgramEntry,
    read_axes,
    read_common,
    read_dtype,
    read_engine,
    read_generation,
    read_range,
)
from tokopt.runtime.format.generation import Generation
from tokopt.runtime.format.reader import (
    MAX_SIZE,
    Invalid,
    Json,
    first_double,
    read_boolean,
    read_choice,
    read_integer,
    read_items,
    read_mapping,
    read_name,
    read_number,
    read_object,
    read_optional,
    read_relative,
    short,
)
from tokopt.runtime.format.schedule import Entry, Schedule, Trigger
from tokopt.runtime.format.signature import Axis, Tensor
from tokopt.runtime.format.state import Occupancy, State, slot_axis

TASKS = ("encoder", "causal-lm")

_ROLES = ("input", "tokens", "positions", "mask", "state", "output", "logits", "score")
_MAIN = {"encoder": "forward", "causal-lm": "step"}  # the program that every artifact of a task has
_COMPACT = "compact"
_STEP_ROLES = {name: name for name in ("tokens", "positions", "mask", "rows", "logits")}
_KINDS = {
    "keys": "key",
    "values": "value",
    "slots": "position",
    "scale": "scale",
    "zero": "zero",
    "length": "length",
    "recent_length": "length",
    "shift": "shift",
    "budget": "budget",
}


@dataclass(frozen=True)
class LegacyState:
    """A state as formats 1 and 2 had it: program output ``output`` becomes the input ``name``.

    ``in_place``: the output of ``step`` is its input with new entries written into it.
    """

    name: str
    dtype: str
    axes: tuple[Axis, ...]
    output: str
    initial: float = 0.0
    in_place: bool = False


@dataclass(frozen=True)
class LegacyModel:
    """How formats 1 and 2 said what a model is."""

    task: str
    programs: Mapping[str, ProgramEntry]
    states: tuple[LegacyState, ...] = ()
    generation: Generation | None = None
    compact_every: int = 0
    endless: bool = False


@dataclass(frozen=True)
class Model:
    """What a manifest of this format says of a model."""

    programs: Mapping[str, ProgramEntry]
    states: tuple[State, ...]
    schedule: Schedule
    generation: Generation | None


def read_legacy(value: Json) -> Manifest:
    """The manifest of format 1 or 2 as one of this format; raises :class:`.Invalid`."""
    keys = "format_version programs files task semantics pipeline passes states generation"
    top = read_object(value, "the manifest", keys + " tokenizer selftest versions")
    generation, every, endless = read_optional(top["generation"], "generation", _generation) or (
        None,
        0,
        False,
    )
    model = convert(
        LegacyModel(
            task=read_choice(top["task"], "task", TASKS),
            programs=read_mapping(top["programs"], "programs", _program),
            states=read_items(top["states"], "states", _state),
            generation=generation,
            compact_every=every,
            endless=endless,
        )
    )
    return Manifest(**vars(model), format_version=FORMAT_VERSION, **read_common(top))


def convert(old: LegacyModel) -> Model:
    """What the names and flags of the older formats said; raises :class:`.Invalid` for what they did not allow."""
    _check(old)
    programs = {name: _converted(name, entry, old) for name, entry in old.programs.items()}
    states = tuple(_converted_state(state, old.states) for state in old.states)
    return Model(programs, states, _schedule(old), old.generation)


def _check(old: LegacyModel) -> None:
    if not old.programs:
        raise Invalid("programs is empty")
    if _MAIN[old.task] not in old.programs:
        raise Invalid(f"programs lacks {_MAIN[old.task]!r}, which {old.task} artifacts have")
    if (old.generation is None) != (old.task == "encoder"):
        raise Invalid(f"generation does not fit the task {old.task}")
    inputs = {tensor.name for entry in old.programs.values() for tensor in entry.inputs}
    outputs = {tensor.name for entry in old.programs.values() for tensor in entry.outputs}
    if double := first_double(state.name for state in old.states):
        raise Invalid(f"states has the name {short(double)} twice")
    for state in old.states:
        if state.name not in inputs or state.output not in outputs:
            raise Invalid(f"state {short(state.name)} is not wired to an input and an output of a program")


def _converted(name: str, entry: ProgramEntry, old: LegacyModel) -> ProgramEntry:
    reads, writes = {s.name: s.name for s in old.states}, {s.output: s.name for s in old.states}
    roles = _STEP_ROLES if old.task == "causal-lm" else {}
    made = replace(
        entry,
        inputs=tuple(_tensor_now(tensor, reads, roles, "input") for tensor in entry.inputs),
        outputs=tuple(_tensor_now(tensor, writes, roles, "output") for tensor in entry.outputs),
    )
    if name != _MAIN[old.task]:
        return made
    shared = {state.output: state.name for state in old.states if state.in_place}
    here = {tensor.name for tensor in (*entry.inputs, *entry.outputs)}
    return replace(made, aliases={o: i for o, i in shared.items() if o in here and i in here})


def _tensor_now(tensor: Tensor, states: Mapping[str, str], roles: Mapping[str, str], other: str) -> Tensor:
    if tensor.name in states:
        return replace(tensor, role="state", state=states[tensor.name])
    return replace(tensor, role=roles.get(tensor.name, other), state=None)


def _converted_state(state: LegacyState, all_states: Sequence[LegacyState]) -> State:
    """``keys_3`` is of layer 3, ``keys_3_codes`` a part of it; every other state of a layer is an eviction's score."""
    axis = slot_axis(state.axes)
    found = re.fullmatch(r"([a-z_]+?)_(\d+)(?:_([a-z]+))?", state.name)
    layer = int(found[2]) if found else None
    stem = state.name if found is None else found[3] if found[3] in ("scale", "zero") else found[1]
    kind = _KINDS.get(stem, "memory" if axis is None else "score")
    occupancy = None if axis is None else _occupancy(axis, all_states)
    return State(state.name, kind, state.dtype, state.axes, state.initial, layer, occupancy)


def _occupancy(axis: str, states: Sequence[LegacyState]) -> Occupancy:
    """Of the axis ``slots_3`` column 3 of ``length``, where that counts by layers; ``recent`` has its own."""
    if axis == "recent":
        return Occupancy("recent_length")
    length = next((state for state in states if state.name == "length"), None)
    layers = length is not None and len(length.axes) > 1
    column = axis.removeprefix("slots").removeprefix("_") or "0"
    if layers and not (column.isascii() and column.isdigit() and len(column) < 6):
        raise Invalid(f"the axis {short(axis)} of a state counts slots of no layer")
    return Occupancy("length", int(column) if layers else None)


def _schedule(old: LegacyModel) -> Schedule:
    main = _MAIN[old.task]
    if old.task == "encoder":
        return Schedule((Entry(main, "encode"),))
    slots = next((t.axes[1] for t in old.programs[main].inputs if t.name == "tokens" and len(t.axes) > 1), 1)
    triggers: tuple[Trigger, ...] = ()
    if _COMPACT in old.programs:
        triggers = (Trigger(_COMPACT, "prefill"),)
        if old.compact_every:
            triggers += (Trigger(_COMPACT, "tokens", old.compact_every, prompt=old.endless),)
    entries = (Entry(main, "prefill", slots), Entry(main, "decode", slots))
    return Schedule(entries, triggers, old.endless)


# --- reading ----------------------------------------------------------------------------------------------


def _program(value: Json, where: str) -> ProgramEntry:
    entry = read_object(value, where, "inputs outputs ranges files", optional="engine")
    return ProgramEntry(
        read_items(entry["inputs"], f"{where}.inputs", _tensor),
        read_items(entry["outputs"], f"{where}.outputs", _tensor),
        read_mapping(entry["ranges"], f"{where}.ranges", read_range),
        read_mapping(entry["files"], f"{where}.files", read_relative),
        read_optional(entry.get("engine"), f"{where}.engine", read_engine),
    )


def _tensor(value: Json, where: str) -> Tensor:
    entry = read_object(value, where, "name dtype axes role")
    return Tensor(
        read_name(entry["name"], f"{where}.name"),
        read_dtype(entry["dtype"], f"{where}.dtype"),
        read_axes(entry["axes"], f"{where}.axes"),
        read_choice(entry["role"], f"{where}.role", _ROLES),
    )


def _state(value: Json, where: str) -> LegacyState:
    entry = read_object(value, where, "name dtype axes output initial in_place")
    return LegacyState(
        read_name(entry["name"], f"{where}.name"),
        read_dtype(entry["dtype"], f"{where}.dtype"),
        read_axes(entry["axes"], f"{where}.axes"),
        read_name(entry["output"], f"{where}.output"),
        read_number(entry["initial"], f"{where}.initial"),
        read_boolean(entry["in_place"], f"{where}.in_place"),
    )


def _generation(value: Json, where: str) -> tuple[Generation, int, bool]:
    keys = "context vocabulary eos bos chat_template compact_every endless"
    entry = read_object(value, where, keys)
    every = read_integer(entry["compact_every"], f"{where}.compact_every", 0, MAX_SIZE)
    return read_generation(entry, where), every, read_boolean(entry["endless"], f"{where}.endless")
