"""What a model remembers of the attention of its tokens, made anew of the committed ones alone.

An eviction that scores slots lets the program that decodes update a memory in every call: out of the queries, the cache
with the new tokens in it, and their positions and mask. A call that reads a tree adds what rejected tokens attend to.
So the same part of the program is inserted once more behind the commit, on the memory as it was before the call, with
the queries of the path, the cache as the path leaves it, and the path's positions and mask: it sees what it would see
had the path alone been read. Nothing is assumed of the method; what it reads is found in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tokopt.errors import PassRefused
from tokopt.ir.export import placeholders
from tokopt.ir.format import State
from tokopt.ir.graph import (
    aten,
    attention_nodes,
    is_call,
    is_tensor,
    operand_at,
    results,
    same_size,
    tensor_inputs,
)
from tokopt.ir.program import Program, TensorSpec
from tokopt.kernels import ops
from tokopt.rewrite.cut import axis_of_size
from tokopt.rewrite.edit import call, inline_nodes

COUNTED = ("length", "shift")
"""Kinds of states whose value after a path follows from its length, or does not change."""


@dataclass
class Observation:
    """The part of ``program`` that makes the next values of its memory; ``module`` is its graph with shapes.

    ``memory`` are the nodes of these values by state. They are made of ``queries``, with the axis of their tokens, of
    ``caches``, the cache with the new tokens by state, and of ``inputs``: positions, mask and other states. Raises
    PassRefused for a memory that is made of anything else.
    """

    program: Program
    module: GraphModule
    states: Mapping[str, State]
    memory: dict[str, Node] = field(init=False, default_factory=dict[str, Node])
    queries: dict[Node, int] = field(init=False, default_factory=dict[Node, int])
    caches: dict[str, Node] = field(init=False, default_factory=dict[str, Node])
    inputs: dict[Node, TensorSpec] = field(init=False, default_factory=dict[Node, TensorSpec])
    _inside: list[Node] = field(init=False, default_factory=list[Node])
    _sizes: dict[Node, tuple[Node, int]] = field(init=False, default_factory=dict[Node, tuple[Node, int]])

    def __post_init__(self) -> None:
        written: dict[Node, str] = {}
        for spec, node in zip(self.program.outputs, results(self.module.graph), strict=True):
            if spec.state is not None and spec.name in self.program.aliases:
                written[node] = spec.state
            elif spec.state is not None and self.states[spec.state].kind not in COUNTED:
                self.memory[spec.state] = node
        inside = {node for name in self.memory for node in self._made_of(name, written)}
        self._inside = [node for node in self.module.graph.nodes if node in inside]

    def insert(self, graph: Graph, given: Mapping[Node, Node], *, like: Node) -> dict[str, Node]:
        """The next values of the memory by state, inserted at the graph's insertion point.

        ``given`` says what takes the place of queries, caches and inputs.
        """
        known = dict(given)
        for size, (measured, axis) in self._sizes.items():
            known[size] = graph.call_function(aten.sym_size.int, (known[measured], axis))
        inline_nodes(graph, self.module, self._inside, known, like=like)
        return {state: known[node] for state, node in self.memory.items()}

    def of_role(self, role: str) -> Node | None:
        """The input of a role, where it is read."""
        return next((node for node, spec in self.inputs.items() if spec.role == role), None)

    def _made_of(self, memory: str, written: Mapping[Node, str]) -> set[Node]:
        """The nodes between what is given and the next value of a memory."""
        inputs = dict(zip(placeholders(self.module), self.program.inputs, strict=True))
        queries, found, sizes = self._query_values(), set[Node](), set[Node]()
        stack = [self.memory[memory]]
        while stack:
            node = stack.pop()
            if is_call(node, aten.sym_size):
                sizes.add(node)
            elif node in queries:
                self.queries[node] = queries[node]
            elif node in written:
                self.caches[written[node]] = node
            elif node in inputs:
                self._take(memory, node, inputs[node], written)
            elif node not in found:
                found.add(node)
                stack += node.all_input_nodes
        given = [*self.queries, *self.caches.values(), *self.inputs]
        for size in sizes:
            measured = axis_of_size(size.meta["val"], given)
            if measured is None:
                raise _rejected(memory)
            self._sizes[size] = measured
        return found

    def _take(self, memory: str, node: Node, spec: TensorSpec, written: Mapping[Node, str]) -> None:
        """An input that a memory is made of; not the tokens, whose path through the model it would be."""
        if spec.role not in ("positions", "mask", "state") or spec.state in written.values():
            raise _rejected(memory)
        self.inputs[node] = spec

    def _query_values(self) -> dict[Node, int]:
        """What attentions take as queries, casts and views of it undone, and the axis of its tokens."""
        inputs = dict(zip(placeholders(self.module), self.program.inputs, strict=True))
        positions = next(node for node, spec in inputs.items() if spec.role == "positions")
        batch, tokens = positions.meta["val"].shape
        found: dict[Node, int] = {}
        for attention in attention_nodes(self.module.graph):
            node = operand_at(attention, 0)
            while is_tensor(node) and node.op == "call_function":
                shape = node.meta["val"].shape
                axes = [axis for axis, size in enumerate(shape) if same_size(size, tokens)]
                if len(axes) == 1 and axes[0] and same_size(shape[0], batch):
                    found[node] = axes[0]
                above = tensor_inputs(node)
                if len(above) != 1:
                    break
                node = above[0]
        return found


def _rejected(memory: str) -> PassRefused:
    return PassRefused(
        f"state {memory!r} is made of more than attention sees, and would take note of tokens that are rejected"
    )


def observe_path(
    graph: Graph,
    observation: Observation,
    given: Mapping[Node, Node],
    path: tuple[Node, Node, Node],
    *,
    gather: bool = True,
) -> dict[str, Node]:
    """The memory by state after a path alone, inserted at the graph's insertion point.

    ``given`` says what takes the place of the observation's queries in the order of the tree, of its caches as the path
    left them, and of states as they were before the call. ``path`` are the path's nodes [batch, nodes], how many of
    them count [batch], and the position of the root [batch, 1]. Without ``gather`` the path's nodes are the first.
    """
    nodes, count, root = path
    known = dict(given)
    for node, axis in observation.queries.items():
        if gather:
            known[node] = call(graph, ops.gather_tokens, given[node], nodes, axis, like=nodes)
    positions, mask = call(graph, path_view, nodes, count, root, like=nodes)
    for role, made in (("positions", positions), ("mask", mask)):
        if (node := observation.of_role(role)) is not None:
            known[node] = made
    return observation.insert(graph, known, like=nodes)


def path_view(path: Tensor, count: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [batch, nodes] of a path that begins at ``root`` [batch, 1], -1 behind its ``count`` [batch].

    And who sees whom [batch, nodes, nodes]: each what comes before it, and itself.
    """
    index = torch.arange(path.shape[1])
    positions = torch.where(index[None] < count[:, None], root + index, -1)
    mask = (index[None, :] <= index[:, None])[None].expand(path.shape[0], -1, -1)
    return positions, mask.clone()
