"""Which places of a tensor are read: who takes a class token's features reads no other token of the last block.

A read of fixed places along one axis (``x[:, 0]``) moves up through everything that works on each place alone: norms,
linears, activations, sums, and the queries of an attention. What it cannot pass, keys and values above all, is read
whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from tokopt.ir.graph import (
    SDPA,
    argument,
    aten,
    is_call,
    is_tensor,
    same_size,
    value_users,
)
from tokopt.kernels import declared

POINTWISE = (
    *(aten.abs, aten.add, aten.alias, aten.clamp, aten.clamp_min, aten.clone, aten.contiguous, aten.div),
    *(aten.dropout, aten.erf, aten.exp, aten.gelu, aten.mul, aten.neg, aten.pow, aten.relu, aten.round),
    *(aten.rsqrt, aten.sigmoid, aten.silu, aten.sub, aten.tanh, aten.to, aten._to_copy),
)
"""Standard operators whose result at a place depends on their operands at that place alone."""

VIEWS = (aten.view, aten.reshape, aten._unsafe_view)

REGROUPINGS = (*VIEWS, aten.flatten, aten.unflatten)
"""Operators that join or split axes; the first ones are told the sizes of all axes."""


@dataclass(frozen=True)
class Part:
    """The places ``start`` to ``stop`` along ``axis``."""

    axis: int
    start: int
    stop: int


def find_parts(graph: Graph) -> dict[Node, Part]:
    """The nodes of which only a part is read and that can be computed for that part alone."""
    parts: dict[Node, Part] = {}
    for node in reversed(graph.nodes):
        if node.op != "call_function" or not is_tensor(node) or fixed_read(node) is not None:
            continue
        part = part_read(node, parts)
        if part is not None and operands_read(node, part.axis) is not None:
            parts[node] = part
    return parts


def fixed_read(node: Node) -> Part | None:
    """What a ``select`` or ``slice`` with fixed ends takes of its operand; None for all of it."""
    if not is_call(node, aten.select, aten.slice):
        return None
    given = node.args[0]
    assert isinstance(given, Node)
    shape = given.meta["val"].shape
    axis = int(argument(node, 1, "dim", 0)) % len(shape)
    size = shape[axis]
    start, stop = (
        (node.args[2], None)
        if is_call(node, aten.select)
        else (argument(node, 2, "start"), argument(node, 3, "end"))
    )
    start = 0 if start is None else start
    if not isinstance(size, int) or not isinstance(start, int) or argument(node, 4, "step", 1) != 1:
        return None
    start += size * (start < 0)
    stop = start + 1 if is_call(node, aten.select) else size if stop is None else stop
    if not isinstance(stop, int):
        return None
    stop = min(stop + size * (stop < 0), size)
    return Part(axis, start, stop) if 0 <= start < stop and stop - start < size else None


def part_read(node: Node, parts: dict[Node, Part]) -> Part | None:
    """The part of a node that its readers need, ``parts`` being all that is computed of them; None for all of it."""
    return _union([_wanted(user, node, parts) for user in value_users(node)])


def _wanted(user: Node, node: Node, parts: dict[Node, Part]) -> Part | None:
    """The part of ``node`` that ``user`` reads; None for all of it."""
    if (read := fixed_read(user)) is not None:
        return read
    if user not in parts:
        return None
    part = parts[user]
    axes = [axis for operand, axis in operands_read(user, part.axis) or () if operand is node]
    whole = len(axes) < sum(operand is node for operand in _flat(user))
    return None if whole or len(set(axes)) != 1 else Part(axes[0], part.start, part.stop)


def _flat(node: Node) -> list[object]:
    return [*node.args, *node.kwargs.values()]


def _union(wanted: Sequence[Part | None]) -> Part | None:
    """The part that holds all of them; None where one wants everything, or they lie along several axes."""
    if not wanted or None in wanted or len({part.axis for part in wanted if part}) != 1:
        return None
    known = [part for part in wanted if part is not None]
    return Part(known[0].axis, min(part.start for part in known), max(part.stop for part in known))


Operands = list[tuple[Node, int]]


def operands_read(node: Node, axis: int) -> Operands | None:
    """Which operands have to be narrowed, along which axes, for ``node`` to be computed for a part of ``axis``.

    None where it cannot be.
    """
    rank = node.meta["val"].ndim
    given = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if given is None:
        return None
    op = declared(node.target)
    if is_call(node, *POINTWISE) or (op is not None and op.elementwise):
        return _aligned(node, axis)
    if is_call(node, aten.layer_norm, aten.rms_norm):
        shape = node.args[1]
        assert isinstance(shape, Sequence)
        return [(given, axis)] if axis < rank - len(shape) else None
    if is_call(node, aten.linear):
        return [(given, axis)] if axis < rank - 1 else None
    if is_call(node, aten.amax):
        dims = [int(dim) % rank for dim in argument(node, 1, "dim", ())]
        return [(given, axis)] if dims and axis not in dims and argument(node, 2, "keepdim", False) else None
    if is_call(node, *REGROUPINGS):
        # Up to and with the axis nothing may be joined or split.
        same = _sizes(node)[: axis + 1] == _sizes(given)[: axis + 1] and given.meta["val"].ndim > axis
        return [(given, axis)] if same else None
    if is_call(node, aten.slice):
        return [(given, axis)] if axis != int(argument(node, 1, "dim", 0)) % rank else None
    if is_call(node, aten.select):
        return [(given, axis + (axis >= int(argument(node, 1, "dim", 0)) % (rank + 1)))]
    if is_call(node, aten.transpose):
        order = list(range(rank))
        first, second = (int(dim) % rank for dim in node.args[1:3])  # type: ignore[call-overload]
        order[first], order[second] = order[second], order[first]
        return [(given, order[axis])]
    if is_call(node, aten.permute):
        return [(given, int(node.args[1][axis]) % rank)]  # type: ignore[index]
    if is_call(node, SDPA):
        return _queries(node, given, axis, rank)
    return None


def _sizes(node: Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _aligned(node: Node, axis: int) -> Operands:
    """The operands of a pointwise operator, without those that are broadcast along the axis."""
    value = node.meta["val"]
    found = []
    for operand in _flat(node):
        if not is_tensor(operand):
            continue
        assert isinstance(operand, Node)
        shape = operand.meta["val"].shape
        own = axis - (value.ndim - len(shape))
        if own >= 0 and same_size(shape[own], value.shape[axis]):
            found.append((operand, own))
    return found


def _queries(node: Node, query: Node, axis: int, rank: int) -> Operands | None:
    """Attention computes every query alone, with its row of the mask."""
    if axis != rank - 2 or argument(node, 5, "is_causal", False):
        return None
    mask = argument(node, 3, "attn_mask")
    rows = isinstance(mask, Node) and mask.meta["val"].ndim > 1 and mask.meta["val"].shape[-2]
    if not isinstance(mask, Node) or rows == 1 or rows is False:
        return [(query, axis)]
    return [(query, axis), (mask, mask.meta["val"].ndim - 2)]
