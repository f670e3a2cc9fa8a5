"""A program on several inputs, computed side by side, node by node.

What follows from parameters alone is computed once and dropped when its last reader is done. So a weight that is stored
in codes is expanded once for all inputs, and no two of them are expanded at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from tokopt.analysis.constants import constants
from tokopt.ir.graph import function_of
from tokopt.ir.shapes import attribute

Tensors = tuple[torch.Tensor, ...]


def run_together(module: GraphModule, inputs: Sequence[Tensors]) -> list[Tensors | Exception]:
    """What the graph gives for each of the inputs, as calling it would; for those that it refuses, its error."""
    shared, last = constants(module.graph), _last_reads(module)
    common: dict[Node, Any] = {}
    runs = [_Run(given) for given in inputs]
    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "get_attr":
                common[node] = attribute(module, node)
            elif node in shared:
                common[node] = _computed(node, common)
            else:
                for run in runs:
                    run.step(node, common)
            for done in last.get(node, ()):
                common.pop(done, None)
                for run in runs:
                    run.known.pop(done, None)
    return [run.result for run in runs]


class _Run:
    """One of the inputs, its values so far, and what came of it."""

    def __init__(self, given: Tensors) -> None:
        self.given = iter(given)
        self.known: dict[Node, Any] = {}
        self.result: Tensors | Exception = ()
        self.refused = False

    def step(self, node: Node, common: dict[Node, Any]) -> None:
        """Compute a node, unless an earlier one failed."""
        if self.refused:
            return
        try:
            if node.op == "placeholder":
                self.known[node] = next(self.given)
            elif node.op == "output":
                self.result = tuple(_filled(node.args[0], self.known, common))
            else:
                self.known[node] = _computed(node, self.known, common)
        except Exception as error:  # whatever an operator raises for sizes that it does not take
            self.result, self.refused = error, True
            self.known.clear()


def _computed(node: Node, *known: dict[Node, Any]) -> Any:
    assert node.op == "call_function", f"{node} is neither an input, a parameter nor an operator"
    return function_of(node)(*_filled(node.args, *known), **_filled(node.kwargs, *known))


def _filled(arguments: Any, *known: dict[Node, Any]) -> Any:
    """Arguments with the values of nodes in their places."""
    return map_arg(arguments, lambda node: next(values[node] for values in known if node in values))


def _last_reads(module: GraphModule) -> dict[Node, list[Node]]:
    """Node -> the nodes whose values nothing reads after it."""
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    last: dict[Node, list[Node]] = {}
    for node in order:
        if node.op != "output":
            last.setdefault(max(node.users, key=order.__getitem__, default=node), []).append(node)
    return last
