"""Verification of trees that a host proposes: what one call read of them is kept along one path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from tokopt.errors import PassError, PassRefused
from tokopt.ir.bundle import Bundle, Semantics, fresh
from tokopt.ir.export import placeholders
from tokopt.ir.format import BATCH, Link, Port, State, find_role
from tokopt.ir.graph import dtype_name
from tokopt.ir.program import AxisRange, Program, TensorSpec
from tokopt.kernels import ops
from tokopt.passes.speculate.committed import (
    check_write,
    longer,
    path_positions,
    refuse_links,
    require_logits,
)
from tokopt.passes.speculate.neighbours import give_neighbours
from tokopt.passes.speculate.observed import Observation, observe_path
from tokopt.passes.speculate.speculate import MOST
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal
from tokopt.rewrite.cache import ProgramEdit, language_program
from tokopt.rewrite.edit import call, close_graph, new_graph, open_graph


@dataclass(frozen=True)
class Verify(Pass):
    """Let a host have trees of proposed tokens verified: by any drafter, any rule and its own logits processors.

    The program that reads and decodes takes a tree as it is: nodes after their parents, a mask in which each sees its
    ancestors and itself, positions by depth; it gives logits after every node. What is added is ``commit``, a program
    of the states alone: the entries of an accepted path are moved to where they would be had its tokens been read one
    by one, and the others are free again. Triggers run between, and see committed tokens only.

    ``neighbours`` tokens are said to be near each that is read, by the distance of their embeddings: the accept rule
    ``lantern`` lets a token stand for its neighbours, which is lossy.

    Rules. One program reads and decodes, and every token has a slot of its own. What a policy that evicts remembers of
    attention is made anew of the accepted path: the program that reads hands on its queries, and what the memory was
    before. The pass comes last. Where drafter and rule are built in, ``speculate`` needs no host.
    """

    neighbours: int = 0

    name: ClassVar[str] = "verify"
    semantics: ClassVar[Semantics] = "lossless"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 0:
            raise PassError(f"{self.name}: neighbours={self.neighbours} must not be negative")

    def requires(self, bundle: Bundle) -> None:
        """Language models whose one program gives logits."""
        require_logits(self.name, bundle)

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Add the program that commits."""
        name = language_program(self.name, bundle)
        added = fresh("commit", bundle.programs)
        try:
            made = _CommitProgram(bundle, name, self.neighbours)
            step, commit = made.programs()
        except PassRefused as reason:
            return PassResult(bundle, 0, (), (Refusal(name, str(reason)),))
        schedule = replace(bundle.schedule, commit=added)
        programs = {**bundle.programs, name: step, added: commit}
        links = (
            *bundle.links,
            *(Link(Port(name, link), Port(added, link), "call") for link in made.handed),
        )
        return PassResult(replace(bundle, programs=programs, links=links, schedule=schedule), 1)


class _CommitProgram:
    """The program that keeps a path of what ``step`` wrote.

    ``handed`` are the links by which ``step`` tells it what a memory is to be made of anew: the queries of the call,
    its positions, and what the memory was before it.
    """

    def __init__(self, bundle: Bundle, name: str, neighbours: int) -> None:
        """Raises PassRefused where rejected tokens cannot be taken back, or none are near others as they should be."""
        self.step = bundle.programs[name]
        refuse_links(self.step)
        mask = find_role(self.step.inputs, "mask")
        if mask is None or isinstance(mask.axes[1], int):
            raise PassRefused("it takes no mask of any number of tokens, so no tree")
        self.nodes = mask.axes[1]
        self.edit = ProgramEdit(bundle, name, open_graph(self.step))
        self.observation = Observation(self.step, self.edit.module, self.edit.states)
        self.states = self._written_states()
        self.handed = dict(self._hand())
        if neighbours:
            give_neighbours(self.edit, neighbours, self._free("neighbours"))
        self.changed = bool(self.handed or neighbours)

    def programs(self) -> tuple[Program, Program]:
        """The program that reads and decodes, which hands what it has to; and the one that commits."""
        step = self.edit.finish() if self.changed else self.step
        links = self._links(step) if self.handed else {}
        states = self._taken()
        names = {state.name for state in states} | {
            axis for s in states for axis in s.axes if isinstance(axis, str)
        }
        path = TensorSpec(fresh("path", {*names, *links}), "int64", (BATCH, self.nodes), "path")
        count = TensorSpec(fresh("count", {*names, *links}), "int64", (BATCH,), "count")
        given = (path, count, *(TensorSpec(s.name, s.dtype, s.axes, "state", s.name) for s in states))
        inputs = (*given, *(spec for spec, _ in links.values()))
        ranges = {axis: step.ranges[axis] for spec in inputs for axis in spec.axes if isinstance(axis, str)}
        ranges[self.nodes] = AxisRange(1, MOST)
        example = (*_example(step, states), *(value for _, value in links.values()))
        module = new_graph(inputs, ranges, example)
        nodes = placeholders(module)
        built = _Commit(states, nodes[: len(given)])
        after = {state.name: built.next(state) for state in self.states}
        handed = dict(zip(links, nodes[len(given) :], strict=True))
        after |= built.observed(
            self.observation, after, {self.handed[name]: node for name, node in handed.items()}
        )
        module.graph.output(tuple(after.values()))
        outputs = tuple(
            TensorSpec(fresh(f"next_{name}", names), s.dtype, s.axes, "state", name)
            for name, s in ((name, self.edit.states[name]) for name in after)
        )
        aliases = {
            out.name: s.name for out, s in zip(outputs, self.states, strict=False) if s.occupancy is not None
        }
        return step, close_graph(Program(module, inputs, outputs, ranges, example), module, aliases=aliases)

    def _written_states(self) -> list[State]:
        """What a call makes longer: lengths and entries of tokens."""
        found: list[State] = []
        for spec, node in zip(self.step.outputs, self.edit.results, strict=True):
            state = None if spec.state is None else self.edit.states[spec.state]
            if state is None or state.kind == "shift" or state.name in self.observation.memory:
                continue
            if spec.name in self.step.aliases:
                assert state.occupancy is not None
                check_write(state, node, self.edit.nodes[state.occupancy.state])
            found.append(state)
        return found

    def _taken(self) -> list[State]:
        """The states that the program takes: those that it writes, and those that a memory is made of beside."""
        read = {spec.state for spec in self.observation.inputs.values()} - set(self.observation.memory)
        return [s for s in self.edit.states.values() if s in self.states or s.name in read]

    def _hand(self) -> Iterator[tuple[str, Node]]:
        """Add the outputs that hand on what memories are made of: the name of each, and the node that it stands for."""
        observation, graph = self.observation, self.edit.module.graph
        for node in observation.queries:
            yield self._output("queries", node), node
        for node, spec in observation.inputs.items():
            if spec.role == "positions" or spec.state in observation.memory:
                with graph.inserting_before(graph.output_node()):
                    before = call(graph, torch.clone, node, like=node)
                yield self._output(f"before_{spec.name}", before), node

    def _output(self, name: str, node: Node) -> str:
        spec = TensorSpec(self._free(name), dtype_name(node.meta["val"].dtype), (), "link")
        self.edit.outputs.append(spec)
        self.edit.results.append(node)
        return spec.name

    def _free(self, name: str) -> str:
        """A name for an output that nothing has."""
        edit = self.edit
        return fresh(name, [*edit.states, *(spec.name for spec in (*edit.inputs, *edit.outputs))])

    def _links(self, step: Program) -> dict[str, tuple[TensorSpec, Tensor]]:
        """What is handed by name, with an example."""
        made = dict(zip((spec.name for spec in step.outputs), step(*step.example), strict=True))
        return {spec.name: (spec, made[spec.name]) for spec in step.outputs if spec.role == "link"}


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
        self.kinds = {state.name: state.kind for state in states}
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

    def observed(
        self, observation: Observation, after: Mapping[str, Node], handed: Mapping[Node, Node]
    ) -> dict[str, Node]:
        """The memory after the path alone, by state.

        ``after`` are the next values of the other states, and ``handed`` is what the call took for the nodes of the
        observation that are no states of this program.
        """
        if not observation.memory:
            return {}
        given = {node: after[state] for state, node in observation.caches.items()}
        for node, spec in observation.inputs.items():
            if spec.state in self.values:
                given[node] = self.values[spec.state]
                if self.kinds[spec.state] == "length":
                    given[node] = self._insert(_length_before, given[node], self.path)
        positions = observation.of_role("positions")
        assert positions is not None, "a memory knows padding by its positions"
        root = self._insert(torch.narrow, handed[positions], 1, 0, 1)
        path = (self.path, self.count, root)
        return observe_path(self.path.graph, observation, {**given, **handed}, path)

    def _insert(self, function: Any, *operands: Any) -> Node:
        return call(self.path.graph, function, *operands, like=self.path)


# --- what is traced ---------------------------------------------------------------------------------------


def _start(length: Tensor, path: Tensor, column: int | None) -> Tensor:
    """The first slot [batch] that the last call wrote of a layer."""
    written = length - path.shape[1]
    return written if column is None else written[:, column]


def _length_before(length: Tensor, path: Tensor) -> Tensor:
    """Lengths before the last call."""
    return length - path.shape[1]


def _kept_length(length: Tensor, path: Tensor, count: Tensor) -> Tensor:
    """Lengths after the path alone."""
    return longer(length - path.shape[1], count)
