"""What programs give for one caller's inputs: one after another in the order of the schedule, links handed on.

A text is read in one call of the program that decodes, after empty caches: the logits are those of a model that has no
cache. What triggers do between calls does not show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import cast

import torch
from torch import Tensor

from tokopt.arguments import check_kind
from tokopt.errors import InputError
from tokopt.ir.graph import dtype_name
from tokopt.ir.program import AxisRange, Program, TensorSpec
from tokopt.runtime.format.link import Link, Port
from tokopt.runtime.format.signature import BATCH, DRAWING, with_role
from tokopt.runtime.format.state import State, slot_axis

_OF_TEXTS = ("tokens", "positions", "mask", "rows")
"""Roles of inputs that programs have which read a text, or a part of what does."""


@dataclass(frozen=True)
class Calls:
    """Programs on what one caller gives, in their order; each runs once, when its answer is first asked for.

    ``given`` are the caller's tensors by name, ``tokens`` [batch, tokens] is one of them where a text is read.
    """

    programs: Mapping[str, Program]
    links: Sequence[Link]
    states: Sequence[State]
    given: Mapping[str, Tensor]
    tokens: Tensor | None = None
    _results: dict[str, tuple[Tensor, ...]] = field(
        init=False, repr=False, default_factory=dict[str, "tuple[Tensor, ...]"]
    )

    def inputs(self, name: str) -> tuple[Tensor, ...]:
        """The inputs of a program.

        Raises InputError for a program that reads what none before it gives, and for sizes that it does not take.
        """
        given = self._given(name, self.programs[name])
        check_sizes(self.programs[name], given)
        return given

    def _given(self, name: str, program: Program) -> tuple[Tensor, ...]:
        links = {spec.name: self._linked(name, spec) for spec in with_role(program.inputs, "link")}
        known = {**self.given, **links}
        if self.tokens is not None and any(spec.role in _OF_TEXTS for spec in program.inputs):
            return first_call(program, self.tokens, self.states, known)
        for spec in program.inputs:
            if spec.state is not None:
                raise InputError(f"{name!r} encodes into the state {spec.state!r}; call the loaded artifact")
        return tuple(known[spec.name] for spec in program.inputs)

    def outputs(self, name: str, role: str) -> dict[str, Tensor]:
        """The outputs of a program that have this role, by name; raises InputError as :meth:`inputs` does."""
        specs = self.programs[name].outputs
        return {
            spec.name: value for spec, value in zip(specs, self._run(name), strict=True) if spec.role == role
        }

    def _linked(self, name: str, spec: TensorSpec) -> Tensor:
        """The value of an input that another program gives."""
        target = Port(name, spec.name)
        source = next(link.source for link in self.links if link.target == target)
        if source.program not in takewhile(lambda other: other != name, self.programs):
            raise InputError(
                f"{name!r} reads {spec.name!r} of an earlier call of {source.program!r}, and a first call has none; "
                "call the loaded artifact"
            )
        place = [other.name for other in self.programs[source.program].outputs].index(source.name)
        return self._run(source.program)[place]

    def _run(self, name: str) -> tuple[Tensor, ...]:
        if name not in self._results:
            self._results[name] = self.programs[name](*self.inputs(name))
        return self._results[name]


def check_sizes(program: Program, given: Sequence[Tensor]) -> None:
    """A graph is right for the sizes that it was captured for, and for others computes something else."""
    sizes: dict[str, tuple[int, str]] = {}
    for spec, tensor in zip(program.inputs, given, strict=True):
        if tensor.ndim != len(spec.axes):
            raise InputError(f"{spec.name!r} has {tensor.ndim} axes, and the program takes {spec}")
        for axis, size in zip(spec.axes, tensor.shape, strict=True):
            bounds = AxisRange(axis, axis) if isinstance(axis, int) else program.ranges[axis]
            if size < bounds.min or (bounds.max is not None and size > bounds.max):
                most = "any number" if bounds.max is None else bounds.max
                raise InputError(
                    f"{spec.name!r} has the size {size} along {axis!r}, and the program takes {bounds.min} to {most}"
                )
            known, other = sizes.setdefault(str(axis), (size, spec.name))
            if size != known:
                raise InputError(
                    f"{spec.name!r} has the size {size} along {axis!r}, and {other!r} has {known}; give them one size"
                )


def check_tensors(tensors: Sequence[object], specs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    """The tensors of a call, one for each of ``specs``; raises InputError for a wrong number, kind, dtype or shape."""
    if len(tensors) != len(specs):
        names = ", ".join(spec.name for spec in specs)
        raise InputError(f"{len(tensors)} tensors were given, the model takes {len(specs)}: {names}")
    for spec, tensor in zip(specs, tensors, strict=True):
        found = check_kind(f"input {spec.name!r}", tensor, Tensor, f"a tensor, {spec}")
        shape = list(found.shape)
        if dtype_name(found.dtype) != spec.dtype:
            raise InputError(
                f"input {spec.name!r} is {dtype_name(found.dtype)}, the model takes {spec}; convert it"
            )
        if len(shape) != len(spec.axes) or any(
            size < 1 or (isinstance(axis, int) and axis != size)
            for axis, size in zip(spec.axes, shape, strict=True)
        ):
            raise InputError(f"input {spec.name!r} has shape {shape}, the model takes {spec}")
    return cast("tuple[Tensor, ...]", tuple(tensors))


def first_call(
    program: Program,
    tokens: Tensor,
    states: Sequence[State],
    linked: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """The inputs of a program that reads ``tokens`` [batch, tokens] into an empty cache of as many slots.

    ``states`` begin with their initial values; logits are asked for every token. ``linked`` are the values of links
    by name.
    """
    batch, count = tokens.shape
    empty = {state.name: initial(state, batch, count) for state in states}
    return call_inputs(program, tokens, torch.arange(count).repeat(batch, 1), empty, linked)


def call_inputs(
    program: Program,
    tokens: Tensor,
    positions: Tensor,
    states: Mapping[str, Tensor],
    linked: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """The inputs of a program that reads ``tokens`` at ``positions`` (both [batch, tokens]) after what ``states`` hold.

    Every new token sees those before it, and logits are asked for all. ``linked`` are the values of links by name.
    """
    batch, count = tokens.shape
    values = {
        "tokens": tokens,
        "positions": positions,
        "mask": torch.ones(count, count, dtype=torch.bool).tril().repeat(batch, 1, 1),
        "rows": torch.arange(count),
        "limit": torch.full((batch,), count),
    }
    for role, (dtype, value) in DRAWING.items():
        values[role] = torch.full((batch,), value, dtype=getattr(torch, dtype))

    def given(spec: TensorSpec) -> Tensor:
        if spec.state is not None:
            return states[spec.state]
        return values[spec.role] if spec.role in values else (linked or {})[spec.name]

    return tuple(map(given, program.inputs))


def initial(state: State, batch: int, slots: int) -> Tensor:
    """A state at the start of a request, with so many slots where it has an axis of them."""
    sizes = {BATCH: batch, slot_axis(state.axes): slots}
    shape = [axis if isinstance(axis, int) else sizes[axis] for axis in state.axes]
    return torch.full(shape, state.initial).to(getattr(torch, state.dtype))
