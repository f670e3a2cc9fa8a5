"""What a language model will take, predicted from its graph: for a prompt, for a token, for several, and of memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tokopt.ir.bundle import Bundle
from tokopt.ir.calls import first_call, initial
from tokopt.ir.format import BATCH, Entry, State, find_role, slot_axis
from tokopt.ir.program import Program
from tokopt.measure.machine import Machine
from tokopt.measure.roofline import Roofline
from tokopt.measure.text_times import ROWS, STEPS, TOKENS
from tokopt.runtime.buffers import capacity
from tokopt.runtime.format.signature import wiring
from tokopt.runtime.loop import PREFILL


@dataclass(frozen=True)
class TextForecast:
    """What one text of a given prompt will take.

    ``read`` are the seconds for the prompt, ``token`` the mean of those for a token after it, with its share of what
    triggers do, ``rows`` the cost of a call by the number of its new tokens, in calls with one, at the start of a text.
    ``weight_bytes`` are those of the parameters as they are stored, ``cache_bytes`` those of the states after the
    prompt.
    """

    read: float
    token: float
    rows: Mapping[int, float]
    weight_bytes: int
    cache_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form with the names that ``tokopt bench`` has."""
        return {
            "ms_per_token": 1e3 * self.token,
            "read_ms": 1e3 * self.read,
            "cost_by_rows": dict(self.rows),
            "weight_bytes": self.weight_bytes,
            "cache_bytes": self.cache_bytes,
        }


def forecast(bundle: Bundle, machine: Machine, prompt: int, tokens: int = TOKENS) -> TextForecast:
    """Predict what one text takes whose prompt has so many tokens, and which goes on for ``tokens`` more."""
    rooflines = {name: Roofline(program) for name, program in bundle.programs.items()}
    step, shares = bundle.main, bundle.schedule.shares(tokens)
    kept = occupied(bundle, prompt)
    slots = {axis: capacity(count + STEPS) for axis, count in kept.items()}

    def call(entry: Entry, count: int) -> float:
        sizes = {**slots, **_call_axes(step, count)}
        return sum(
            rooflines[name].seconds(machine, sizes | _call_axes(bundle.programs[name], count))
            for name in entry.programs
        )

    after = [trigger for trigger in bundle.schedule.triggers if trigger.after == "tokens"]
    compacting = sum(rooflines[t.program].seconds(machine, {BATCH: 1, **slots}) / t.every for t in after)
    first = next(iter(shares))
    one = call(first, 1)
    mean = sum(share * call(entry, 1) for entry, share in shares.items())
    return TextForecast(
        _reading(bundle, rooflines, machine, prompt),
        mean + compacting,
        {count: call(first, count) / one for count in ROWS if _takes(step, count)},
        max(sum(rooflines[name].weight_bytes for name in each.programs) for each in bundle.schedule.entries),
        sum(_bytes(state, slots) for state in bundle.states),
    )


def _reading(bundle: Bundle, rooflines: Mapping[str, Roofline], machine: Machine, prompt: int) -> float:
    """The seconds of all calls that read the prompt."""
    entry = bundle.schedule.entry("prefill") or bundle.schedule.entry("decode")
    assert entry is not None
    program = bundle.programs[entry.program]
    axes = [axis for state in bundle.states if (axis := slot_axis(state.axes)) is not None]
    most = program.ranges[name].max if isinstance(name := _tokens_axis(program), str) else name
    size = min(PREFILL, most or PREFILL)
    total = 0.0
    for start in range(0, prompt, size):
        count = min(size, prompt - start)
        sizes = dict.fromkeys(axes, capacity(prompt + STEPS))
        sizes |= _call_axes(program, count)
        total += sum(
            rooflines[name].seconds(machine, sizes | _call_axes(bundle.programs[name], count))
            for name in entry.programs
        )
    return total


def occupied(bundle: Bundle, prompt: int) -> dict[str, int]:
    """The occupied slots after a prompt of so many tokens, by slot axis: what triggers leave of it.

    The prompt is random tokens, read and compacted: how many slots stay does not depend on what they hold.
    """
    axes = {axis: state for state in bundle.states if (axis := slot_axis(state.axes)) is not None}
    compactions = [t.program for t in bundle.schedule.triggers if t.after == "prefill"]
    decode = bundle.schedule.entry("decode")
    linked = any(spec.role in ("link", "input") for spec in bundle.main.inputs)
    linked = linked or (decode is not None and bool(decode.then))
    if not compactions or linked or bundle.generation is None:
        return dict.fromkeys(axes, prompt)
    vocabulary, generator = bundle.generation.vocabulary, torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, prompt), generator=generator)
    states = {state.name: initial(state, 1, prompt) for state in bundle.states}
    states |= _next_states(bundle.main, first_call(bundle.main, tokens, bundle.states))
    for name in compactions:
        program = bundle.programs[name]
        given = tuple(
            states[spec.state] if spec.state is not None else torch.ones(1, dtype=torch.bool)
            for spec in program.inputs
        )
        states |= _next_states(program, given)
    found: dict[str, int] = {}
    for axis, state in axes.items():
        assert state.occupancy is not None
        lengths, column = states[state.occupancy.state], state.occupancy.column
        found[axis] = int((lengths if column is None else lengths[:, column]).max())
    return found


def _next_states(program: Program, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    names = wiring(program.outputs)
    made = zip(program.outputs, program(*inputs), strict=True)
    return {names[spec.name]: value for spec, value in made if spec.name in names}


def _tokens_axis(program: Program) -> str | int:
    tokens = find_role(program.inputs, "tokens")
    return 1 if tokens is None else tokens.axes[1]


def _takes(program: Program, count: int) -> bool:
    axis = _tokens_axis(program)
    most = program.ranges[axis].max if isinstance(axis, str) else axis
    return most is None or count <= most


def _call_axes(program: Program, count: int) -> dict[str, int]:
    """The sizes of the axes of a call that reads ``count`` tokens of one text and asks for the logits of the last."""
    rows, tokens = find_role(program.inputs, "rows"), _tokens_axis(program)
    sizes = {BATCH: 1}
    if isinstance(tokens, str):
        sizes[tokens] = count
    if rows is not None and isinstance(rows.axes[0], str):
        sizes[rows.axes[0]] = 1
    return sizes


def _bytes(state: State, slots: Mapping[str, int]) -> int:
    sizes = {BATCH: 1, **slots}
    shape = [axis if isinstance(axis, int) else sizes[axis] for axis in state.axes]
    return math.prod(shape) * np.dtype(state.dtype).itemsize
