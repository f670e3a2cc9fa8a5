"""Cut a program in two at one of its values, so that the two in a row do exactly what the whole does.

The second half computes what depends on the value that it is cut at. What else it needs of the first half is handed on
by links, and masks, rotary tables and sizes, which no parameter is multiplied into, are computed again from the inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule

from tokopt.errors import PassRefused
from tokopt.ir.bundle import fresh
from tokopt.ir.export import axis_names, placeholders, spell
from tokopt.ir.format import BATCH, Link, Port
from tokopt.ir.graph import (
    SDPA,
    aten,
    describe,
    drop_dead,
    dtype_name,
    is_call,
    is_tensor,
    operand_at,
    reaches,
    results,
    same_size,
)
from tokopt.ir.program import Program, TensorSpec
from tokopt.ir.shapes import Shapes
from tokopt.kernels import ops
from tokopt.rewrite.edit import after, call, close_graph

_PRODUCTS = (
    *(aten.linear, aten.addmm, aten.mm, aten._int_mm, aten.einsum, aten.baddbmm, ops.expert_linear),
    *(aten.embedding, aten.convolution, aten.conv1d, aten.conv2d, aten.conv3d),
)
"""Operators whose work is worth doing once."""


@dataclass(frozen=True)
class Halves:
    """Two programs that do in a row what one did.

    ``links`` are the names of the first's outputs of role ``"link"``, which are those of the inputs that the second
    takes them by; ``stream`` is the one that carries the value of the cut. Caller's inputs are read by either half, and
    by both where both need them. ``second`` has all outputs for the caller. Its inputs of role ``"link"`` that are not
    in ``links`` are the whole's own.
    """

    first: Program
    second: Program
    links: tuple[str, ...]
    stream: str

    def links_of(
        self, links: Iterable[Link], whole: str, first: str, second: str, when: str = "once"
    ) -> tuple[Link, ...]:
        """A bundle's links once its program ``whole`` is cut into the programs ``first`` and ``second``."""
        made: list[Link] = []
        for link in links:
            source, target = link.source, link.target
            if source.program == whole:
                source = Port(second, source.name)
            readers = [target]
            if target.program == whole:
                halves = ((first, self.first), (second, self.second))
                readers = [
                    Port(name, target.name)
                    for name, half in halves
                    if target.name in (spec.name for spec in half.inputs)
                ]
            made += [Link(source, reader, link.when) for reader in readers]
        return (*made, *(Link(Port(first, name), Port(second, name), when) for name in self.links))


def cut(program: Program, module: GraphModule, at: Node, early: Collection[str] = ()) -> Halves:
    """Cut a program at a value of its open graph ``module``, which stays as it is.

    The first half gives the outputs that ``early`` names, the second all others. A state goes to the half that reads
    and writes it. One that both read, such as a length, is written by the second half alone. Raises PassRefused where a
    value that has to be handed on has no batch axis of variable size, or an axis whose size is computed of others.
    """
    return _Cut(program, module, at, early).halves()


@dataclass
class _Cut:
    """``hands`` are the values that the first half hands on, that of the cut in front; ``kept`` has the second half.

    ``states`` are those that the second half has to do with.
    """

    program: Program
    module: GraphModule
    at: Node
    early: Collection[str] = ()
    hands: list[Node] = field(init=False, default_factory=list[Node])
    kept: set[Node] = field(init=False, default_factory=set[Node])
    states: set[str] = field(init=False, default_factory=set[str])

    def __post_init__(self) -> None:
        graph = self.module.graph
        Shapes.attached(self.module).refresh(self.module)
        self.inputs = dict(zip(placeholders(self.module), self.program.inputs, strict=True))
        self.outputs = list(zip(self.program.outputs, results(graph), strict=True))
        self.later = reaches(self.at)
        self.content = _content(graph, {node for node, spec in self.inputs.items() if spec.role == "link"})
        self.names = axis_names(list(self.inputs), self.program.inputs)

    def halves(self) -> Halves:
        """Both programs."""
        if self.at in self.inputs:
            raise PassRefused("nothing is computed before the place where the model would be cut")
        self._divide()
        taken = [spec.name for spec in (*self.program.inputs, *self.program.outputs)]
        specs: list[TensorSpec] = []
        for node in self.hands:
            name = fresh("stream" if node is self.at else "carried", [*taken, *(s.name for s in specs)])
            specs.append(TensorSpec(name, dtype_name(node.meta["val"].dtype), (), "link"))
        first = self._first(specs)
        specs = list(first.outputs[: len(specs)])
        second = self._second(specs, first(*first.example)[: len(specs)])
        return Halves(first, second, tuple(spec.name for spec in specs), specs[0].name)

    # --- which half computes what ---------------------------------------------------------------------------

    def _divide(self) -> None:
        """Find what the second half computes, and what it is handed.

        It writes every state that it reads, so that the first half's call does not change what it is given.
        """
        self._batch_axis(self.at)
        more = {self._state_of(spec) for spec, node in self.outputs if node in self.later}
        while True:
            self.states |= {state for state in more if state is not None}
            self.hands, self.kept = [self.at], set()
            for spec, node in self.outputs:
                if self._is_second(spec):
                    self._need(node)
            more = {self.inputs[node].state for node in self.kept if node in self.inputs} - {None}
            if more <= self.states:
                return

    def _state_of(self, spec: TensorSpec) -> str | None:
        """The state that an output is the next value of, or a buffer of."""
        if spec.name not in self.program.aliases:
            return spec.state
        source = self.program.aliases[spec.name]
        return next(given.state for given in self.program.inputs if given.name == source)

    def _is_second(self, spec: TensorSpec) -> bool:
        """Whether the second half gives an output: all that is no state or early, and states that it has to do with."""
        if spec.name in self.early:
            return False
        state = self._state_of(spec)
        return state is None or state in self.states

    def _need(self, node: Node) -> None:
        """The second half needs a value: it computes it, or is handed it."""
        stack = [node]
        while stack:
            current = stack.pop()
            if current in self.kept or current in self.hands:
                continue
            if current in self.inputs:
                self.kept.add(current)
                continue
            if current not in self.later and current in self.content and self._can_hand(current):
                self.hands.append(current)
                continue
            if current not in self.later and _multiplies(current) and current in self.content:
                raise PassRefused(
                    f"{describe(current)} is needed after the cut, and {self._batchless(current)}"
                )
            self.kept.add(current)
            if not is_call(current, aten.sym_size):
                stack += current.all_input_nodes

    def _can_hand(self, node: Node) -> bool:
        return is_tensor(node) and self._batchless(node) is None

    def _batch_axis(self, node: Node) -> int:
        """The axis of a value that counts rows; raises PassRefused where a link cannot carry it."""
        if reason := self._batchless(node):
            raise PassRefused(f"{describe(node)} is where the model would be cut, and {reason}")
        return self._spelled(node).index(BATCH)

    def _batchless(self, node: Node) -> str | None:
        """Why a link cannot carry a value; None where it can."""
        axes = self._spelled(node)
        if BATCH not in axes:
            return "it has no axis of the batch; capture with a batch of variable size"
        computed = [axis for axis in axes if isinstance(axis, str) and axis not in self.program.ranges]
        if computed:
            return f"it has an axis of {computed[0]}, and what is handed on has plain axes; capture with fixed sizes"
        return None

    def _spelled(self, node: Node) -> list[int | str]:
        shape = node.meta["val"].shape
        return [size if isinstance(size, int) else spell(size, self.names) for size in shape]

    # --- the halves -----------------------------------------------------------------------------------------

    def _first(self, specs: Sequence[TensorSpec]) -> Program:
        """What comes before: links in front of the states that it writes."""
        twin, known = _twin(self.program, self.module)
        nodes = [self._moved(known[node], self._batch_axis(node)) for node in self.hands]
        mine = [(spec, node) for spec, node in self.outputs if not self._is_second(spec)]
        outputs = (*specs, *(spec for spec, _ in mine))
        return self._closed(twin, [*nodes, *(known[node] for _, node in mine)], outputs, self.program.example)

    def _second(self, specs: Sequence[TensorSpec], example: Sequence[Tensor]) -> Program:
        """What comes after: links behind the inputs."""
        twin, known = _twin(self.program, self.module)
        shapes, graph = Shapes.attached(twin), twin.graph
        given: list[Node] = []
        for spec, node in zip(specs, self.hands, strict=True):
            with graph.inserting_after(placeholders(twin)[-1]):
                place = graph.placeholder(spec.name)
            place.meta["val"] = shapes.blank(spec)
            given.append(place)
            inside = self._moved(place, self._batch_axis(node))
            known[node].replace_all_uses_with(inside)
            known[node] = inside
        self._measure_again(twin, known, given)
        mine = [(spec, node) for spec, node in self.outputs if self._is_second(spec)]
        made = [self._passed(known[node]) for _, node in mine]
        program = replace(self.program, inputs=(*self.program.inputs, *specs))
        return self._closed(
            twin, made, tuple(s for s, _ in mine), (*self.program.example, *example), program, given
        )

    def _moved(self, node: Node, axis: int) -> Node:
        """The value with the batch in front, or put back from there."""
        if axis == 0:
            return node
        with after(node):
            return call(node.graph, torch.transpose, node, 0, axis, like=node)

    def _passed(self, node: Node) -> Node:
        """A result that the second half only hands on becomes one of its own."""
        if node.op != "placeholder":
            return node
        with node.graph.inserting_before(node.graph.output_node()):
            return call(node.graph, torch.clone, node, like=node)

    def _measure_again(self, twin: GraphModule, known: dict[Node, Node], given: Sequence[Node]) -> None:
        """Take the sizes of what the second half has not from its inputs."""
        own = {known[node] for node in self.kept} | set(given)
        inputs = [known[node] for node in self.inputs if node in self.kept]
        rest = [known[node] for node, spec in self.inputs.items() if node not in self.kept and not spec.state]
        for node in [known[old] for old in self.kept if is_call(old, aten.sym_size)]:
            measured = node.args[0]
            if measured in own:
                continue
            found = axis_of_size(node.meta["val"], [*given, *inputs, *rest])
            if found is None:
                raise PassRefused(f"{describe(node)} measures what only the first half has")
            node.args = found

    def _closed(
        self,
        twin: GraphModule,
        made: Sequence[Node],
        outputs: tuple[TensorSpec, ...],
        example: Sequence[Tensor],
        program: Program | None = None,
        given: Sequence[Node] = (),
    ) -> Program:
        """A half, without the inputs that it does not read; those that none reads stay with the second."""
        program = program or self.program
        graph = twin.graph
        graph.output_node().args = (tuple(made),)
        drop_dead(graph)
        unread = {spec.name for node, spec in self.inputs.items() if not node.users}
        kept: list[tuple[TensorSpec, Tensor]] = []
        for node, spec, value in zip(placeholders(twin), program.inputs, example, strict=True):
            if node.users or (given and (spec.name in unread or node in given)):
                kept.append((spec, value))
            else:
                graph.erase_node(node)
        axes = {axis for spec, _ in kept for axis in spec.axes}
        names = {spec.name for spec in outputs}
        return close_graph(
            replace(program, ranges={a: bounds for a, bounds in program.ranges.items() if a in axes}),
            twin,
            inputs=tuple(spec for spec, _ in kept),
            outputs=outputs,
            example=tuple(value for _, value in kept),
            aliases={out: source for out, source in program.aliases.items() if out in names},
        )


def _multiplies(node: Node) -> bool:
    """Whether a node is a product of matrices, a look-up or an attention; an outer product, of angles say, is none."""
    if is_call(node, aten.matmul, aten.bmm):
        return operand_at(node, 0).meta["val"].shape[-1] != 1
    return is_call(node, SDPA, *_PRODUCTS)


def _content(graph: Graph, linked: set[Node]) -> set[Node]:
    """The values that the model made of its inputs by products, and what it was ``linked``; not positions and masks."""
    found, depends = set(linked), set[Node]()
    for node in graph.nodes:
        if is_call(node, aten.sym_size):
            continue
        above = node.all_input_nodes
        if node.op == "placeholder" or not depends.isdisjoint(above):
            depends.add(node)
            if _multiplies(node) or not found.isdisjoint(above):
                found.add(node)
    return found


def _twin(program: Program, module: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A copy of an open graph that shares its parameters, and what became of every node."""
    graph, known = Graph(), dict[Node, Node]()
    made: Any = graph.graph_copy(module.graph, known)
    graph.output(made)
    twin = LazyGraphModule(module, graph)
    Shapes.attached(module).derive(twin, program.ranges)
    return twin, known


def axis_of_size(size: Any, nodes: Iterable[Node]) -> tuple[Node, int] | None:
    """The first of some values that has an axis of this size, and the axis; None where none has."""
    for node in nodes:
        for axis, found in enumerate(node.meta["val"].shape):
            if same_size(found, size):
                return node, axis
    return None
