"""Optimisation profiles: the sizes of the named axes that an engine is built for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tokopt.errors import InputError
from tokopt.ir.bundle import Bundle
from tokopt.ir.format import BATCH, find_role, slot_axis
from tokopt.ir.program import Program
from tokopt.runtime.format.manifest import Profile
from tokopt.runtime.loop import PREFILL

SLOTS = 2048
"""Slots of a cache, where nothing else is said and the model's context is not shorter."""

ROWS, TEXTS = 32, 8
"""The largest batch of a program that encodes, and of one that reads texts, where it has no end of its own."""

TOKENS = 512
"""The most token ids that a program encodes, where nothing else is said."""

_TEXT = re.compile(r"([^=]+)=(\d+)(?::(\d+):(\d+))?")


def parse_profiles(texts: Sequence[str]) -> dict[str, Profile]:
    """``"batch=1:8:32"`` (smallest, most frequent, largest size) or ``"slots=1024"`` (no other size), by axis.

    Raises InputError for another spelling, sizes out of order, and an axis that is given twice.

    >>> parse_profiles(["batch=1:8:32", "slots=1024"])["batch"]
    Profile(min=1, opt=8, max=32)
    """
    found: dict[str, Profile] = {}
    for text in texts:
        match = _TEXT.fullmatch(text)
        if match is None:
            raise InputError(
                f"{text!r} is no profile; write axis=min:opt:max, for example batch=1:8:32, or axis=size"
            )
        axis, low = match[1], int(match[2])
        profile = Profile(low, int(match[3] or low), int(match[4] or low))
        if axis in found:
            raise InputError(f"the profile of axis {axis!r} is given twice; give it once")
        if not 1 <= profile.min <= profile.opt <= profile.max:
            raise InputError(
                f"the sizes of the profile {text!r} are not in order; write 1 <= min <= opt <= max"
            )
        found[axis] = profile
    return found


def choose_profiles(bundle: Bundle, given: Mapping[str, Profile]) -> dict[str, dict[str, Profile]]:
    """The profile of every named axis of every program's inputs.

    What is not ``given`` follows from the axis' range and the example; a language model is built for single tokens
    and prompts of 256, with a cache of a fixed number of slots, which alone can be written in place. Raises
    InputError for an axis that no program has, and for sizes outside its range.
    """
    slots = {axis for state in bundle.states if (axis := slot_axis(state.axes)) is not None}
    chosen = {
        name: {
            axis: given.get(axis) or _default(bundle, program, axis, slots)
            for axis in _example_sizes(program)
        }
        for name, program in bundle.programs.items()
    }
    known = {axis for axes in chosen.values() for axis in axes}
    for axis in given:
        if axis not in known:
            raise InputError(
                f"there is no axis {axis!r} to give a profile; the model has {', '.join(sorted(known))}"
            )
    for name, program in bundle.programs.items():
        _check(program, chosen[name])
        fewest = min((p.max for axis, p in chosen[name].items() if axis in slots), default=None)
        axis = _axis_of(program, "tokens")
        if fewest is not None and axis is not None and axis not in given:
            chosen[name][axis] = replace(chosen[name][axis], max=min(chosen[name][axis].max, fewest))
    return chosen


def _default(bundle: Bundle, program: Program, axis: str, slots: set[str]) -> Profile:
    bounds, size = program.ranges[axis], _example_sizes(program)[axis]
    if axis in slots:
        longest = bundle.generation.context if bundle.generation else SLOTS
        count = min(SLOTS, longest, bounds.max or SLOTS)
        return Profile(count, count, count)
    low = max(bounds.min, 1)
    usual = low if bundle.schedule.generates else size
    high = max(_largest(bundle, program, axis) or size, usual)
    return Profile(low, usual, high if bounds.max is None else min(high, bounds.max))


def _largest(bundle: Bundle, program: Program, axis: str) -> int | None:
    """The size up to which an engine is built along an axis without an end; None: the example's."""
    if axis == BATCH:
        return TEXTS if bundle.schedule.generates else ROWS
    if bundle.schedule.generates:
        return PREFILL if axis in (_axis_of(program, "tokens"), _axis_of(program, "rows")) else None
    counts = any(axis in spec.axes for spec in program.inputs if spec.dtype == "int64")
    return TOKENS if counts else None


def _axis_of(program: Program, role: str) -> str | None:
    """The named axis that counts what an input of a role holds."""
    spec = find_role(program.inputs, role)
    return spec.axes[-1] if spec is not None and isinstance(spec.axes[-1], str) else None


def _check(program: Program, profiles: Mapping[str, Profile]) -> None:
    for axis, profile in profiles.items():
        bounds = program.ranges[axis]
        if profile.min < bounds.min or (bounds.max is not None and profile.max > bounds.max):
            most = "" if bounds.max is None else f" to {bounds.max}"
            raise InputError(
                f"the profile {axis}={profile} leaves the sizes that the program "
                f"takes, from {bounds.min}{most}; choose sizes among them"
            )


def _example_sizes(program: Program) -> dict[str, int]:
    """The size that every named axis of the inputs has in the example."""
    return {
        axis: size
        for spec, tensor in zip(program.inputs, program.example, strict=True)
        for axis, size in zip(spec.axes, tensor.shape, strict=True)
        if isinstance(axis, str)
    }
