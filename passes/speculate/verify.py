"""Verification of trees that a host proposes: what one call read of them is kept along one path."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from tokopt.errors import PassRefused
from tokopt.ir.bundle import Bundle, Semantics, fresh
from tokopt.ir.export import placeholders
from tokopt.ir.format import BATCH, State, find_role
from tokopt.ir.graph import results
from tokopt.ir.program import AxisRange, Program, TensorSpec
from tokopt.kernels import ops
from tokopt.passes.speculate.committed import (
    check_write,
    longer,
    path_positions,
    refuse_links,
    refuse_memory,
    require_logits,
)
from tokopt.passes.speculate.speculate import MOST, NODES
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal
from tokopt.rewrite.cache import language_program
from tokopt.rewrite.edit import call, close_graph, new_graph


@dataclass(frozen=True)
class Verify(Pass):
    """Let a host have trees of proposed tokens verified: by any drafter, any rule and its own logits processors.

    The program that reads and decodes takes a tree as it is: nodes after their parents, a mask in which each sees its
    ancestors and itself, positions by depth; it gives logits after every node. What is added is ``commit``, a program
    of the states alone: the entries of an accepted path are moved to where they would be had its tokens been read one
    by one, and the others are free again. Triggers run between, and see committed tokens only.

    Rules. One program reads and decodes, and every token has a slot of its own, so a policy that evicts by scores of
    its own is refused. The pass comes last. Where drafter and rule are built in, ``speculate`` needs no host.
    """

    name: ClassVar[str] = "verify"
    semantics: ClassVar[Semantics] = "lossless"

    def requires(self, bundle: Bundle) -> None:
        """Language models whose one program gives logits."""
        require_logits(self.name, bundle)

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Add the program that commits."""
        name = language_program(self.name, bundle)
        try:
            made = _commit_program(bundle, bundle.programs[name])
        except PassRefused as reason:
            return PassResult(bundle, 0, (), (Refusal(name, str(reason)),))
        added = fresh("commit", bundle.programs)
        schedule = replace(bundle.schedule, commit=added)
        programs = {**bundle.programs, added: made}
        return PassResult(replace(bundle, programs=programs, schedule=schedule), 1)


def _commit_program(bundle: Bundle, step: Program) -> Program:
    """The program that keeps a path of what ``step`` wrote; raises PassRefused where that cannot be."""
    refuse_links(step)
    mask = find_role(step.inputs, "mask")
    if mask is None or isinstance(mask.axes[1], int):
        raise PassRefused("it takes no mask of any number of tokens, so no tree")
    states = _written_states(bundle, step)
    taken = {state.name for state in states} | {
        axis for s in states for axis in s.axes if isinstance(axis, str)
    }
    path = TensorSpec(fresh("path", taken), "int64", (BATCH, fresh(NODES, taken)), "path")
    count = TensorSpec(fresh("count", taken), "int64", (BATCH,), "count")
    inputs = (path, count, *(TensorSpec(s.name, s.dtype, s.axes, "state", s.name) for s in states))
    ranges = {axis: step.ranges[axis] for s in states for axis in s.axes if isinstance(axis, str)}
    ranges[str(path.axes[1])] = AxisRange(1, MOST)
    example = _example(step, states)
    module = new_graph(inputs, ranges, example)
    given = placeholders(module)
    built = _Commit(states, given)
    module.graph.output(tuple(built.next(state) for state in states))
    outputs = tuple(
        TensorSpec(fresh(f"next_{s.name}", taken), s.dtype, s.axes, "state", s.name) for s in states
    )
    aliases = {out.name: s.name for out, s in zip(outputs, states, strict=True) if s.occupancy is not None}
    return close_graph(Program(module, inputs, outputs, ranges, example), module, aliases=aliases)


def _written_states(bundle: Bundle, step: Program) -> list[State]:
    """What a call of ``step`` makes longer: lengths and entries of tokens."""
    known = {state.name: state for state in bundle.states}
    inputs = {
        spec.state: node
        for spec, node in zip(step.inputs, placeholders(step.module), strict=True)
        if spec.state
    }
    found: list[State] = []
    for spec, node in zip(step.outputs, results(step.module.graph), strict=True):
        if spec.state is None or known[spec.state].kind == "shift":
            continue
        state = known[spec.state]
        if spec.name in step.aliases:
            assert state.occupancy is not None
            check_write(state, node, inputs[state.occupancy.state])
        elif state.kind != "length":
            refuse_memory(state)
        found.append(state)
    return found


def _example(step: Program, states: list[State]) -> tuple[Tensor, ...]:
    """A path, how much of it counts, and states after the example's tokens were read; every slot has a position."""
    known = {spec.state: tensor for spec, tensor in zip(step.inputs, step.example, strict=True) if spec.state}
    tokens = next(x for spec, x in zip(step.inputs, step.example, strict=True) if spec.role == "tokens")
    batch, nodes = tokens.shape
    path = torch.arange(nodes).clamp_max(1) + torch.arange(nodes)  # the root, and every second node after it
    path = path.clamp_max(nodes - 1).repeat(batch, 1)
    count = (nodes - 1 - torch.arange(batch)).clamp_min(0)
    made = [_filled(state, known[state.name], nodes) for state in states]
    return path, count, *made


def _filled(state: State, example: Tensor, nodes: int) -> Tensor:
    if state.kind == "length":
        return example + nodes
    if state.kind == "position":
        return torch.arange(example.shape[2])[:, None].expand(example.shape).contiguous()
    return example


class _Commit:
    """Inserts what the program does, state by state."""

    def __init__(self, states: list[State], given: list[Node]) -> None:
        """``given`` are the inputs: the path, the count, and the states."""
        self.path, self.count, *values = given
        self.values = {state.name: node for state, node in zip(states, values, strict=True)}
        self.starts: dict[tuple[str, int | None], Node] = {}

    def next(self, state: State) -> Node:
        """A state after the path alone."""
        value = self.values[state.name]
        if state.occupancy is None:
            return self._insert(_kept_length, value, self.path, self.count)
        place = (state.occupancy.state, state.occupancy.column)
        if place not in self.starts:
            self.starts[place] = self._insert(_start, self.values[place[0]], self.path, place[1])
        start = self.starts[place]
        if state.kind == "position":
            return self._insert(path_positions, value, self.path, self.count, start)
        return self._insert(ops.move_entries, value, self.path, start)

    def _insert(self, function: Any, *operands: Any) -> Node:
        return call(self.path.graph, function, *operands, like=self.path)


# --- what is traced ---------------------------------------------------------------------------------------


def _start(length: Tensor, path: Tensor, column: int | None) -> Tensor:
    """The first slot [batch] that the last call wrote of a layer."""
    written = length - path.shape[1]
    return written if column is None else written[:, column]


def _kept_length(length: Tensor, path: Tensor, count: Tensor) -> Tensor:
    """Lengths after the path alone."""
    return longer(length - path.shape[1], count)
