"""Attention over a cache that is written out: capped logits (Gemma 2) and attention sinks (gpt-oss), which SDPA lacks.

What is recognised is ``weights(cap(scale * query @ keys.T) hidden by mask [beside sinks]) @ values``, in which no step
minds the order of slots: scaling and capping are pointwise, the mask is the cache's own and hides for good (nothing
caps after it), the softmax sums over all slots and the sinks, and heads of keys are repeated as a whole. What else
reads the logits takes their largest or their sum over all slots (the sinks of Granite).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from tokopt.ir.graph import (
    HIDDEN,
    ancestors,
    argument,
    aten,
    is_call,
    operand_at,
    same_size,
    sizes,
    value_users,
)
from tokopt.kernels import ops

_NO_OPS = (aten.dropout, aten.clone, aten.contiguous, aten.alias, aten.detach)
_WHOLE = (aten.unsqueeze, aten.expand, aten.reshape, aten.view, aten._unsafe_view, aten.slice, *_NO_OPS)
"""What repeats heads."""


@dataclass(frozen=True)
class Hiding:
    """How a mask hides slots: ``node`` takes ``operand``, which is ``mask`` (a ``cache_mask``) as ``spelled``.

    ``spelled`` makes the operand of a mask [batch, 1 or heads, tokens, slots] bool; None where it is the mask itself.
    """

    node: Node
    operand: Node
    mask: Node
    spelled: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Reading:
    """An attention over a cache: its result, its queries, the ``cache_write`` calls that it reads, what hides slots."""

    node: Node
    query: Node
    keys: Node
    values: Node
    hiding: Hiding


def written_out(node: Node) -> Reading | None:
    """The attention of which ``node`` is the softmax; None where it is none over a cache that is known."""
    if not is_call(node, aten.softmax, aten._softmax) or not _last(node, argument(node, 1, "dim")):
        return None
    found = _logits(operand_at(node, 0))
    if found is None:
        return None
    product, hiding, sinks = found
    weights = _past(node, sinks)
    if weights is None or not is_call(weights, aten.matmul):
        return None
    query, turned = operand_at(product, 0), operand_at(product, 1)
    keys, values = _cache(_turned_back(turned)), _cache(operand_at(weights, 1))
    if keys is None or values is None:
        return None
    return Reading(weights, query, keys, values, hiding)


def _last(node: Node, axis: object) -> bool:
    return axis in (-1, operand_at(node, 0).meta["val"].dim() - 1)


def _logits(node: Node) -> tuple[Node, Hiding, bool] | None:
    """The product that a softmax is of, what hides slots in it, and whether sinks stand beside them."""
    hiding, sinks = None, False
    while not is_call(node, aten.matmul):
        before = _less_largest(node)
        if before is None and sum(not _reduces(user) for user in value_users(node)) > 1:
            return None
        if before is not None:
            node = before
        elif hiding is None and not sinks and (before := _beside_sinks(node)) is not None:
            node, sinks = before, True
        elif hiding is None:
            if (hidden := _hidden(node)) is None:
                return None
            node, hiding = hidden
        elif is_call(node, aten.tanh, *_NO_OPS) or _scaled(node):
            node = operand_at(node, 0)
        else:
            return None
    if hiding is None or len(value_users(node)) != 1:
        return None
    return node, hiding, sinks


def _scaled(node: Node) -> bool:
    return is_call(node, aten.mul, aten.div) and isinstance(node.args[1], int | float)


def _less_largest(node: Node) -> Node | None:
    """What the largest logit of every query is taken from, which a softmax does not see."""
    if not is_call(node, aten.sub.Tensor) or len(node.args) != 2 or node.kwargs:
        return None
    logits, largest = operand_at(node, 0), node.args[1]
    if is_call(largest, operator.getitem):
        largest = operand_at(largest, 0)
    if not isinstance(largest, Node) or is_call(largest, aten.logsumexp.default) or not _reduces(largest):
        return None
    return logits if operand_at(largest, 0) is logits and argument(largest, 2, "keepdim") else None


def _axis(node: Node) -> object:
    axis = argument(node, 1, "dim")
    return axis[0] if isinstance(axis, list | tuple) and len(axis) == 1 else axis


def _reduces(node: Node) -> bool:
    """Whether a node is the largest number along the last axis, or the sum of all in the logarithm."""
    if not is_call(node, aten.max.dim, aten.amax.default, aten.logsumexp.default) or not _last(
        node, _axis(node)
    ):
        return False
    values = all(is_call(user, operator.getitem) and user.args[1] == 0 for user in node.users)
    return values or not is_call(node, aten.max.dim)  # which also says where it is


def _beside_sinks(node: Node) -> Node | None:
    """The logits of all slots, behind which stands one number per head that no slot is of."""
    if not is_call(node, aten.cat.default) or not _last_of_cat(node):
        return None
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    if len(parts) != 2 or not all(isinstance(part, Node) for part in parts):
        return None
    logits, sinks = (part for part in parts if isinstance(part, Node))
    reads = any(is_call(n, ops.cache_write, ops.cache_mask) for n in {sinks, *ancestors(sinks)})
    return None if reads or sizes(sinks)[-1] != 1 else logits


def _last_of_cat(node: Node) -> bool:
    return argument(node, 1, "dim", 0) in (-1, node.meta["val"].dim() - 1)


def _hidden(node: Node) -> tuple[Node, Hiding] | None:
    """The logits before a mask of a cache hides slots of them, by a number that is added or put in their place."""
    if is_call(node, aten.add.Tensor) and len(node.args) == 2 and not node.kwargs:
        logits, number = operand_at(node, 0), node.args[1]
        if is_call(number, aten.where.Scalar):
            mask, shown, low = (number.args[place] for place in range(3))
            if is_call(mask, ops.cache_mask) and shown == 0 and isinstance(low, float) and low <= HIDDEN:
                return logits, Hiding(node, number, mask, partial(_added, low=low))
    if is_call(node, aten.masked_fill.Scalar):
        logits, hidden, low = (node.args[place] for place in range(3))
        if (
            is_call(hidden, aten.bitwise_not, aten.logical_not)
            and isinstance(low, int | float)
            and low <= HIDDEN
        ):
            mask = operand_at(hidden, 0)
            if is_call(mask, ops.cache_mask) and isinstance(logits, Node):
                return logits, Hiding(node, hidden, mask, torch.logical_not)
    return None


def _added(mask: Tensor, low: float) -> Tensor:
    return torch.where(mask, 0.0, low)


def _past(node: Node, sinks: bool) -> Node | None:
    """The product with the values, which takes the weights of all slots and not those of the sinks."""
    cut = not sinks
    while len(value_users(node)) == 1:
        (user,) = value_users(node)
        if is_call(user, *_NO_OPS):
            node = user
        elif not cut and is_call(user, aten.slice.Tensor) and user.args[1:] in ((3, 0, -1), (-1, 0, -1)):
            node, cut = user, True
        else:
            return user if cut and user.args[0] is node else None
    return None


def _turned_back(node: Node) -> Node | None:
    """The keys [batch, heads, slots, channels] that are turned to [batch, heads, channels, slots]."""
    if is_call(node, aten.transpose.int) and {a % 4 for a in node.args[1:] if isinstance(a, int)} == {2, 3}:
        return operand_at(node, 0)
    return operand_at(node, 0) if is_call(node, aten.mT.default) else None


def _cache(repeated: Node | None) -> Node | None:
    """The ``cache_write`` of which a node is the result, its heads repeated or not; None where more reads it."""
    node, unsqueezed = repeated, list[object]()
    while node is not None and not is_call(node, ops.cache_write):
        if not is_call(node, *_WHOLE) or not _keeps_slots(node):
            return None
        if is_call(node, aten.unsqueeze):
            unsqueezed.append(node.args[1])
        node = operand_at(node, 0)
    if node is None or repeated is None or len(_shape(node)) != 4 or len(_shape(repeated)) != 4:
        return None
    # A head of keys has to stand for heads of queries side by side, as a mask of its own is repeated.
    beside = unsqueezed == [2] or (not unsqueezed and same_size(_shape(node)[1], _shape(repeated)[1]))
    readers = [user for user in value_users(node) if user.op != "output"]
    return node if beside and len(readers) == 1 and same_size(_shape(node)[0], _shape(repeated)[0]) else None


def _keeps_slots(node: Node) -> bool:
    """Whether the last two axes, slots and channels, are what they were, and no head is left out."""
    new, old = _shape(node), _shape(operand_at(node, 0))
    if is_call(node, aten.slice):
        return len(new) == len(old) and all(map(same_size, new, old))
    if is_call(node, aten.unsqueeze) and node.args[1] not in range(len(old) - 1):
        return False
    return all(map(same_size, new[-2:], old[-2:]))


def _shape(node: Node) -> tuple[int | torch.SymInt, ...]:
    """The node's shape, whose sizes are numbers or symbols."""
    return tuple(node.meta["val"].shape)
