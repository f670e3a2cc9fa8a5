"""Weights that are no linear layer's, and linear layers whose outputs choose: what quantization leaves as it is."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Graph, Node

from tokopt.analysis.linears import Experts, Linear, find_experts, find_linears, float_constants, matches
from tokopt.ir.graph import aten, describe, is_call, parameter_path, reaches
from tokopt.kernels import ops

Use = Literal["product", "convolution", "embedding"]

_PRODUCTS = (
    *(aten.linear, aten.addmm, aten.mm, aten.matmul, aten.bmm, aten.baddbmm, aten.addbmm, aten.mv, aten.dot),
    *(
        aten.einsum,
        aten.tensordot,
        aten.bilinear,
        aten._grouped_mm,
        aten.lstm,
        aten.gru,
        aten.rnn_tanh,
        aten.rnn_relu,
        ops.expert_linear,
    ),
)

_CONVOLUTIONS = (
    *(aten.convolution, aten.conv1d, aten.conv2d, aten.conv3d),
    *(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
)

_SAME_ENTRIES = (
    *(
        aten.view,
        aten.reshape,
        aten.flatten,
        aten.unflatten,
        aten.transpose,
        aten.permute,
        aten.t,
        aten.expand,
    ),
    *(
        aten.unsqueeze,
        aten.squeeze,
        aten.clone,
        aten.contiguous,
        aten.to,
        aten._to_copy,
        aten.slice,
        aten.select,
    ),
    *(aten.index, aten.index_select, aten.gather, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind),
    operator.getitem,
)
"""What hands on the entries of its operand, all or some."""

_CHOICES = (aten.topk, aten.sort, aten.argsort, aten.argmax)
"""What chooses among the entries of its operand."""

_OWN = ("aten", "prim", "prims", "tokopt")
"""Namespaces of operators of which it is known whether they multiply."""


@dataclass(frozen=True)
class OtherWeight:
    """A parameter that ``node``, which is no linear layer, reads as the weight of a product or as a table."""

    weight: Node
    node: Node
    use: Use

    @property
    def path(self) -> str:
        """The dotted path of the parameter in the user's model."""
        return parameter_path(self.weight)

    @property
    def reason(self) -> str:
        """Why passes that change linear layers leave it alone."""
        shape = list(self.weight.meta["val"].shape)
        return f"{describe(self.node)} reads these weights {shape}, and it is no linear layer; leave them out by skip"

    @property
    def megabytes(self) -> float:
        """What it takes."""
        value = self.weight.meta["val"]
        return value.numel() * value.element_size() / 1e6


@dataclass(frozen=True)
class Weights:
    """The weights of a graph: linear layers, those of them that are routers set apart, experts, and others.

    The experts' weights are among the ``others``, too: those of passes that know linear layers alone.
    """

    linears: tuple[Linear, ...]
    routers: tuple[Linear, ...]
    experts: tuple[Experts, ...]
    others: tuple[OtherWeight, ...]

    @classmethod
    def of(cls, graph: Graph) -> Weights:
        """What a graph reads."""
        linears = find_linears(graph)
        routers = find_routers(linears)
        rest = tuple(linear for linear in linears if linear not in routers)
        return cls(rest, routers, tuple(find_experts(graph)), other_weights(graph, linears))

    def unknown(self, only: tuple[str, ...], skip: tuple[str, ...]) -> list[OtherWeight]:
        """Weights of products that are no linear layers, among those that the patterns choose."""
        return [one for one in self.others if one.use == "product" and matches(one.path, only, skip)]

    @property
    def note(self) -> tuple[str, ...]:
        """What a pass that changes linear layers leaves in float by its rules."""
        uses: tuple[Use, ...] = ("embedding", "convolution")
        sizes = {use: sum(one.megabytes for one in self.others if one.use == use) for use in uses}
        parts = [f"{_megabytes(size)} MB of {use}s" for use, size in sizes.items() if size]
        parts += [f"the router {linear.path}" for linear in self.routers]
        return (f"left in float: {', '.join(parts)}",) if parts else ()


def _megabytes(size: float) -> str:
    """Two digits, and all those before the point.

    >>> _megabytes(0.0251), _megabytes(113.2)
    ('0.025', '113')
    """
    return f"{size:.2g}" if size < 10 else f"{size:.0f}"


def other_weights(graph: Graph, linears: Sequence[Linear]) -> tuple[OtherWeight, ...]:
    """The parameters of two or more axes that are no linear layer's weight, once for every kind of use."""
    constants, known = float_constants(graph), {linear.node for linear in linears}
    found: dict[tuple[Node, Use], OtherWeight] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "get_attr" or not isinstance(value, torch.Tensor):
            continue
        if value.ndim < 2 or not value.is_floating_point():
            continue
        for reader in _readers(node, constants):
            if reader not in known and (use := _use(reader)) is not None:
                found.setdefault((node, use), OtherWeight(node, reader, use))
    return tuple(found.values())


def _readers(weight: Node, constants: set[Node]) -> Iterator[Node]:
    """What reads a parameter, or entries of it, together with activations."""
    stack, seen = [weight], {weight}
    while stack:
        operand = stack.pop()
        for reader in operand.users:
            if reader in constants or (is_call(reader, *_SAME_ENTRIES) and reader.args[0] is operand):
                if reader not in seen:
                    seen.add(reader)
                    stack.append(reader)
            else:
                yield reader


def _use(reader: Node) -> Use | None:
    if is_call(reader, aten.embedding, aten.embedding_bag):
        return "embedding"
    if is_call(reader, *_CONVOLUTIONS):
        return "convolution"
    return "product" if is_call(reader, *_PRODUCTS) or _is_foreign(reader) else None


def _is_foreign(node: Node) -> bool:
    """Whether a node calls an operator of another library, or a branch or loop: they may multiply."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace not in _OWN
    return isinstance(target, torch._ops.HigherOrderOperator)


def find_routers(linears: Iterable[Linear]) -> tuple[Linear, ...]:
    """Linear layers whose outputs choose by rank what is multiplied next, as those of experts do."""
    return tuple(linear for linear in linears if any(map(_leads_to_a_product, _choices(linear.node))))


def _choices(node: Node) -> Iterator[Node]:
    """The choices among the entries of a node's value."""
    stack, seen = [node], {node}
    while stack:
        for reader in stack.pop().users:
            if is_call(reader, *_CHOICES) or _reads_place(reader):
                yield reader
            elif _keeps_ranks(reader) and reader not in seen:
                seen.add(reader)
                stack.append(reader)


def _reads_place(node: Node) -> bool:
    """Whether a node is a maximum whose place, not its value alone, is read."""
    return is_call(node, aten.max.dim) and any(user.args[1] == 1 and user.users for user in node.users)


def _keeps_ranks(node: Node) -> bool:
    """Whether a node's entries are each made of one entry, or of one and the scores beside it."""
    if is_call(node, *_SAME_ENTRIES, aten.softmax, aten._softmax, aten.log_softmax, aten.dropout):
        return True
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _leads_to_a_product(choice: Node) -> bool:
    return any(is_call(node, *_PRODUCTS) or _is_foreign(node) for node in reaches(choice))
