"""What a program costs: floating-point operations, bytes moved, nodes, tokens per block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Node

from tokopt.analysis.blocks import find_sites
from tokopt.ir.bundle import Bundle
from tokopt.ir.graph import aten, is_call, is_tensor, operand_at, sizes
from tokopt.ir.program import Program
from tokopt.kernels import ops


@dataclass(frozen=True)
class Cost:
    """Cost of one call under the example inputs.

    ``flops`` counts a multiply-add as 2 and covers matrix products, convolutions and attention. ``bytes`` is
    every operand and result of every op, once: an upper bound on memory traffic without fusion. ``tokens`` is
    the number of key tokens of every attention, in order.
    """

    flops: int
    bytes: int
    nodes: int
    parameters: int
    tokens: tuple[int, ...]


def program_cost(program: Program) -> Cost:
    """The cost of one call of ``program``, from shapes alone."""
    graph = program.module.graph
    compute = [n for n in graph.nodes if n.op == "call_function" and is_tensor(n)]
    return Cost(
        flops=sum(map(node_flops, compute)),
        bytes=sum(map(node_bytes, compute)),
        nodes=sum(n.op == "call_function" for n in graph.nodes),
        parameters=sum(p.numel() for p in program.module.state_dict().values()),
        tokens=tuple(site.tokens for site in find_sites(graph)),
    )


def bundle_cost(bundle: Bundle) -> Cost:
    """The cost of calling every program of the bundle once."""
    costs = [program_cost(program) for program in bundle.programs.values()]
    return Cost(
        flops=sum(c.flops for c in costs),
        bytes=sum(c.bytes for c in costs),
        nodes=sum(c.nodes for c in costs),
        parameters=max(c.parameters for c in costs),
        tokens=tuple(t for c in costs for t in c.tokens),
    )


_VIEWS = (
    *(aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze),
    *(aten.transpose, aten.t, aten.permute, aten.expand, aten.slice, aten.dropout),
)
"""What moves nothing (dropout, in a model that infers)."""

SizesOf = Callable[[Node], tuple[int, ...]]
"""The shape of a node's value."""


def node_flops(node: Node, sizes: SizesOf = sizes) -> int:
    """Floating-point operations of one node, 0 for anything that is not a matrix product."""
    out = math.prod(sizes(node))
    if is_call(node, aten.linear):
        return 2 * out * sizes(operand_at(node, 0))[-1]
    if is_call(node, aten.matmul, aten.bmm, aten.mm):
        return 2 * out * sizes(operand_at(node, 0))[-1]
    if is_call(node, aten.addmm, aten.baddbmm):
        return 2 * out * sizes(operand_at(node, 1))[-1]
    if is_call(node, aten.conv1d, aten.conv2d, aten.convolution):
        return 2 * out * math.prod(sizes(operand_at(node, 1))[1:])
    if is_call(node, aten.scaled_dot_product_attention):
        return 4 * out * sizes(operand_at(node, 1))[-2]
    if is_call(node, ops.expert_linear):
        return 2 * out * sizes(operand_at(node, 0))[-1]
    return 0


def node_bytes(node: Node, sizes: SizesOf = sizes) -> int:
    """Bytes of the node's tensor operands and result; views move nothing, and of a table only what is taken is read."""
    if is_call(node, *_VIEWS):
        return 0
    read = [n for n in node.all_input_nodes if is_tensor(n)]
    if is_call(node, aten.embedding, aten.index, aten.index_select, aten.gather):
        read = [node, *read[1:]]
    return sum(math.prod(sizes(n)) * n.meta["val"].element_size() for n in [node, *read])
