"""Calls of programs whose state a caller has to make."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokopt.errors import InputError
from tokopt.ir.program import Program, TensorSpec
from tokopt.runtime.format.signature import BATCH
from tokopt.runtime.format.state import State, slot_axis


def first_call(program: Program, tokens: Tensor, states: Sequence[State]) -> tuple[Tensor, ...]:
    """The inputs of a program that reads ``tokens`` [batch, tokens] into an empty cache of as many slots.

    ``states`` begin with their initial values; logits are asked for every token. Raises InputError for a program that
    reads what another one gives.
    """
    batch, count = tokens.shape
    known = {state.name: state for state in states}
    values = {
        "tokens": tokens,
        "positions": torch.arange(count).repeat(batch, 1),
        "mask": torch.ones(count, count, dtype=torch.bool).tril().repeat(batch, 1, 1),
        "rows": torch.arange(count),
        "limit": torch.full((batch,), count),
    }

    def value(spec: TensorSpec) -> Tensor:
        if spec.state is None:
            if spec.role not in values:
                raise InputError(
                    f"tokens alone do not run a program that reads {spec.name!r} from another one; calibrate and "
                    "compare bundles whose decoder has no links"
                )
            return values[spec.role]
        return initial(known[spec.state], batch, count)

    return tuple(map(value, program.inputs))


def initial(state: State, batch: int, slots: int) -> Tensor:
    """A state at the start of a request, with so many slots where it has an axis of them."""
    sizes = {BATCH: batch, slot_axis(state.axes): slots}
    shape = [axis if isinstance(axis, int) else sizes[axis] for axis in state.axes]
    return torch.full(shape, state.initial).to(getattr(torch, state.dtype))
