"""Copying one graph into another."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from tokopt.ir.shapes import Shapes, attribute

_COPIES = (
    torch.ops.aten.lift_fresh_copy.default,
    torch.ops.aten.detach_.default,
    torch.ops.aten.detach.default,
)


def drop_lifts(graph: Graph) -> None:
    """Let constants be read directly, where tracing copied them."""
    for node in list(graph.nodes):
        if node.target in _COPIES and node.args[0].op == "get_attr":
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def splice(graph: Graph, module: GraphModule, operands: list[Node], *, like: Node | None = None) -> Any:
    """Copy a whole graph, fed with ``operands``, to the insertion point; returns what it returns, as nodes.

    Nodes are attributed to ``like``'s module, or stay attributed as they are.
    """
    given = iter(operands)
    known: dict[Node, Any] = {node: next(given) for node in module.graph.nodes if node.op == "placeholder"}
    splice_nodes(graph, module, module.graph.nodes, known, like=like)

    def copied(value: object) -> object:
        return known[value] if isinstance(value, Node) else value

    return pytree.tree_map(copied, module.graph.output_node().args[0], is_leaf=_is_node)


def splice_nodes(
    graph: Graph,
    module: GraphModule,
    nodes: Iterable[Node],
    known: dict[Node, Any],
    *,
    like: Node | None = None,
) -> None:
    """Copy ``nodes`` of a module's graph, in order, to the insertion point; ``known`` says what became of each.

    Those that are known before, inputs and the output are not copied. Nodes are attributed as :func:`splice` says.
    """
    held = _Held(graph)
    for node in nodes:
        if node in known or node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            known[node] = _take_attribute(graph, module, node, held)
        else:
            known[node] = graph.node_copy(node, lambda n: known[n])
        if like is not None:
            _attribute_to(known[node], like)


def _is_node(value: object) -> bool:
    return isinstance(value, Node)


def _attribute_to(node: Node, like: Node) -> None:
    for key in ("nn_module_stack", "stack_trace"):
        node.meta.pop(key, None)
        if key in like.meta:
            node.meta[key] = like.meta[key]


def _take_attribute(graph: Graph, module: GraphModule, node: Node, held: _Held) -> Node:
    """A read of the attribute that ``node`` reads, which becomes one of the graph's own module."""
    value = attribute(module, node)
    made = graph.get_attr(held.name(str(node.target), value))
    symbols = Shapes.attached(held.module).symbols
    made.meta["val"] = symbols.constant(value) if isinstance(value, Tensor) else value
    return made


class _Held:
    """The names under which a graph's module holds tensors and sub-modules, which are looked up once."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @property
    def module(self) -> GraphModule:
        """The graph's own."""
        assert self.graph.owning_module is not None, "a graph without a module holds nothing"
        return self.graph.owning_module

    @cached_property
    def names(self) -> dict[int, str]:
        """By identity; the first name of several."""
        modules = cast("Iterable[tuple[str, torch.nn.Module]]", self.module.named_modules())
        held = (*self.module.named_parameters(), *self.module.named_buffers(), *modules)
        return {id(value): name for name, value in reversed(held)}

    def name(self, wanted: str, value: Any) -> str:
        """That of a tensor or sub-module; it is registered where it is new."""
        if id(value) not in self.names:
            stem = wanted.replace(".", "_")
            free = (f"{stem}_{i}" if i else stem for i in count())
            name = self.names[id(value)] = next(name for name in free if not hasattr(self.module, name))
            if isinstance(value, torch.nn.Module):
                self.module.add_module(name, value)
            else:
                self.module.register_buffer(name, value.detach())
        return self.names[id(value)]
