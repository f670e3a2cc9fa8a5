"""Copying one graph into another."""

from __future__ import annotations

from collections.abc import Iterable
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
    known: dict[Node, Any] = {}
    given = iter(operands)

    def copied(value: object) -> object:
        return known[value] if isinstance(value, Node) else value

    for node in module.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(given)
        elif node.op == "output":
            return pytree.tree_map(copied, node.args[0], is_leaf=_is_node)
        elif node.op == "get_attr":
            known[node] = _take_attribute(graph, module, node)
        else:
            known[node] = graph.node_copy(node, lambda n: known[n])
        if node.op != "placeholder" and like is not None:
            _attribute_to(known[node], like)
    raise AssertionError("a graph has an output")


def _is_node(value: object) -> bool:
    return isinstance(value, Node)


def _attribute_to(node: Node, like: Node) -> None:
    for key in ("nn_module_stack", "stack_trace"):
        node.meta.pop(key, None)
        if key in like.meta:
            node.meta[key] = like.meta[key]


def _take_attribute(graph: Graph, module: GraphModule, node: Node) -> Node:
    """A read of the attribute that ``node`` reads, which becomes one of the graph's own module."""
    owner = graph.owning_module
    assert owner is not None
    value = attribute(module, node)
    made = graph.get_attr(_held(owner, str(node.target), value))
    made.meta["val"] = Shapes.attached(owner).symbols.constant(value) if isinstance(value, Tensor) else value
    return made


def _held(module: GraphModule, wanted: str, value: Any) -> str:
    """The name under which the module holds a tensor or a sub-module; it is registered where it is new."""
    modules = cast("Iterable[tuple[str, torch.nn.Module]]", module.named_modules())
    for name, known in (*module.named_parameters(), *module.named_buffers(), *modules):
        if known is value:
            return name
    stem, count = wanted.replace(".", "_"), 0
    while hasattr(module, name := f"{stem}_{count}" if count else stem):
        count += 1
    if isinstance(value, torch.nn.Module):
        module.add_module(name, value)
    else:
        module.register_buffer(name, value.detach())
    return name
