"""What stays of the entries that proposed tokens left in a cache: those of the committed path, where they belong."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from tokopt.errors import PassError, PassRefused
from tokopt.ir.bundle import Bundle
from tokopt.ir.format import State, emits_tokens
from tokopt.ir.graph import is_call
from tokopt.ir.program import Program
from tokopt.kernels import ops
from tokopt.rewrite.cache import language_program

KEPT = ("key", "value", "scale", "zero", "position")
"""Kinds of states in which every slot belongs to a token."""


def require_logits(name: str, bundle: Bundle) -> None:
    """Language models whose one program gives logits, for the pass of this name; raises PassError for others."""
    program = language_program(name, bundle)
    if emits_tokens(bundle.programs[program]):
        raise PassError(f"{name}: program {program!r} draws its tokens already; leave sample out")


def check_write(state: State, written: Node, length: Node) -> None:
    """What a state holds of a token lies in the token's slot, so that it can be moved.

    ``written`` is its next value, and ``length`` the input that counts its slots. Raises PassRefused.
    """
    start = written.args[2] if is_call(written, ops.cache_write) else None
    while isinstance(start, Node) and start is not length and len(start.all_input_nodes) == 1:
        (start,) = start.all_input_nodes  # a column of the lengths
    if state.kind not in KEPT or start is not length:
        raise PassRefused(f"state {state.name!r} holds more than an entry for every token")


def refuse_links(program: Program) -> None:
    """Raise PassRefused for a program that does not decode alone."""
    if any(spec.role == "link" for spec in (*program.inputs, *program.outputs)):
        raise PassRefused("it takes from other programs, or gives to them")


def path_positions(slots: Tensor, path: Tensor, count: Tensor, length: Tensor) -> Tensor:
    """Positions of slots [batch, heads, slots, 1] in which the path alone stands, the first ``count`` [batch] of it.

    ``path`` [batch, nodes] says where its nodes were written, counted from ``length`` [batch]; those behind the count
    are free again.
    """
    heads, nodes = slots.shape[1], path.shape[1]
    index = (length[:, None] + path)[:, None, :, None].expand(-1, heads, -1, 1)
    inside = (torch.arange(nodes) < count[:, None])[:, None, :, None]
    return ops.cache_write(slots, torch.where(inside, slots.gather(2, index), -1), length)


def longer(length: Tensor, count: Tensor) -> Tensor:
    """Lengths [batch] or [batch, columns] after ``count`` [batch] tokens more."""
    return length + count.reshape(-1, *[1] * (length.ndim - 1))
