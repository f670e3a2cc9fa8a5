"""The linear layers of a graph: products of activations with a weight that is a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tokopt.analysis.constants import constants, evaluate
from tokopt.ir.graph import ancestors, aten, is_call, module_path, operand_at, parameter_path
from tokopt.kernels import ops

EXPANDING = (ops.dequantize_weight, ops.dequantize_float8)
"""What computes a weight from codes, its first operand, and scales, its second."""


@dataclass(frozen=True)
class Linear:
    """``x @ W.T`` with ``W`` [out, in].

    ``input`` is x as it was found, and another linear may have made it; ``place`` is the position of the weight among
    the node's arguments; ``transposed`` says that it is [in, out] (``addmm``, ``matmul``).
    """

    node: Node
    input: Node
    place: int
    transposed: bool

    @property
    def given(self) -> Node:
        """The node of x, as it is now."""
        return operand_at(self.node, self.place - 1)

    @property
    def weight(self) -> Node:
        """The weight's node, as it is now."""
        weight = self.node.args[self.place]
        assert isinstance(weight, Node)
        return weight

    @property
    def bias(self) -> Node | None:
        """What is added to the product."""
        place = 0 if is_call(self.node, aten.addmm) else 2
        bias = self.node.args[place] if place < len(self.node.args) else None
        return bias if isinstance(bias, Node) else None

    @property
    def path(self) -> str:
        """The dotted path of the layer in the user's model."""
        return module_path(self.node) or str(self.weight.target)

    def matrix(self, module: GraphModule) -> Tensor:
        """The weight [out, in], detached."""
        weight = evaluate(module, self.weight, {})
        return weight.T if self.transposed else weight


@dataclass(frozen=True)
class Experts(Linear):
    """``tokopt::expert_linear``: its matrix is those of all experts one below another, [experts x out, in]."""

    @property
    def given(self) -> Node:
        """The node of x, as it is now."""
        return operand_at(self.node, 0)

    @property
    def path(self) -> str:
        """The dotted path of the parameter in the user's model: a module of experts has two."""
        sources = (node for node in (self.weight, *ancestors(self.weight)) if node.op == "get_attr")
        return next(map(parameter_path, sources), super().path)

    def matrix(self, module: GraphModule) -> Tensor:
        """The weight [experts x out, in], detached."""
        return evaluate(module, self.weight, {}).flatten(0, 1)


@dataclass(frozen=True)
class Table(Linear):
    """``embedding(W, ids)`` with ``W`` [rows, channels]: rows are read, and not multiplied.

    ``node`` is the first that reads it, and ``input`` its ids.
    """

    @property
    def given(self) -> Node:
        """The node of the ids, as it is now."""
        return operand_at(self.node, 1)


def find_tables(graph: Graph) -> list[Table]:
    """Every table of embeddings that is a parameter, or is computed from parameters alone, in execution order."""
    known = float_constants(graph)
    found: dict[Node, Table] = {}
    for node in graph.nodes:
        if is_call(node, aten.embedding) and operand_at(node, 0) in known and node not in known:
            found.setdefault(operand_at(node, 0), Table(node, operand_at(node, 1), 0, transposed=False))
    return list(found.values())


def find_experts(graph: Graph) -> list[Experts]:
    """Every product with weights of chosen experts, in execution order, that are parameters or follow from them."""
    known = float_constants(graph)
    found = [_experts(node) for node in graph.nodes if is_call(node, ops.expert_linear)]
    return [one for one in found if one.weight in known]


def _experts(node: Node) -> Experts:
    given = node.args[0]
    assert isinstance(given, Node)
    return Experts(node, given, 2, transposed=False)


def find_linears(graph: Graph) -> list[Linear]:
    """Every linear layer, in execution order: its weight is a parameter, or is computed from parameters alone."""
    known = float_constants(graph)
    products = (as_linear(node) for node in graph.nodes)
    return [one for one in products if one is not None and one.weight in known and one.input not in known]


def float_constants(graph: Graph) -> set[Node]:
    """Nodes that are computed from parameters alone, quantized weights and what is made of them left out."""
    found, quantized = constants(graph), set[Node]()
    for node in graph.nodes:
        if is_call(node, *EXPANDING) or not quantized.isdisjoint(node.all_input_nodes):
            quantized.add(node)
    return found - quantized


def matches(path: str, only: tuple[str, ...], skip: tuple[str, ...]) -> bool:
    """Whether a module path fits one of the patterns ``only`` (none: all) and none of ``skip``.

    >>> matches("model.layers.0.mlp.up_proj", ("*mlp*",), ("*down*",))
    True
    """
    chosen = not only or any(fnmatchcase(path, pattern) for pattern in only)
    return chosen and not any(fnmatchcase(path, pattern) for pattern in skip)


def as_linear(node: Node) -> Linear | None:
    """A product with a matrix as a linear layer whose weight that matrix is, wherever it comes from."""
    if is_call(node, aten.linear):
        return _with_weight(node, 0, 1, transposed=False)
    if is_call(node, aten.addmm):
        return _with_weight(node, 1, 2, transposed=True)
    if is_call(node, aten.mm, aten.matmul):
        return _with_weight(node, 0, 1, transposed=True)
    return None


def _with_weight(node: Node, x: int, weight: int, *, transposed: bool) -> Linear | None:
    given, matrix = node.args[x], node.args[weight]
    if not isinstance(given, Node) or not isinstance(matrix, Node):
        return None
    value = matrix.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.ndim != 2 or not value.is_floating_point():
        return None
    return Linear(node, given, weight, transposed)
