"""The values of nodes that are computed from parameters, and from what is given, alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from tokopt.ir.graph import function_of, is_tensor, is_tensor_list


def parameter(module: GraphModule, node: Node) -> Tensor:
    """The tensor behind a ``get_attr`` node, detached."""
    value: object = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value.detach()


def evaluate(module: GraphModule, node: Node, known: dict[Node, Any]) -> Any:
    """The value of ``node``, given the ``known`` values of some nodes, which gain those that were computed.

    Every way up from the node has to end at a parameter or at a known node.
    """
    if node not in known:
        assert node.op in ("get_attr", "call_function"), f"{node} is neither a parameter nor known"
        if node.op == "get_attr":
            known[node] = parameter(module, node)
        else:
            args, kwargs = map_arg((node.args, node.kwargs), lambda given: evaluate(module, given, known))
            known[node] = function_of(node)(*args, **kwargs)
    return known[node]


def constants(graph: Graph) -> set[Node]:
    """The nodes whose tensors are computed from parameters alone, by operators that draw no numbers."""
    found: set[Node] = set()
    for node in graph.nodes:
        computed = node.op == "call_function" and bool(node.all_input_nodes)
        if not (computed or node.op == "get_attr") or not (is_tensor(node) or is_tensor_list(node)):
            continue
        tags = getattr(node.target, "tags", ())
        if found.issuperset(node.all_input_nodes) and torch.Tag.nondeterministic_seeded not in tags:
            found.add(node)
    return found
