"""Is it proved that no new token sees a later one? The kernel that writes and attends at once takes it for granted."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tokopt.lower.onnx.nodes import array, input_at
from tokopt.lower.onnx.rule import Unfit

_VIEWS = ("full_view", "sliding_view")
"""The halves of ``cache_mask``: what of the past is seen, and which new token sees which."""


def require_causal(mask: ir.Value, length: ir.Value, causal: str | None) -> None:
    """Raise Unfit unless a mask [batch, heads, tokens, slots] hides from every new token those written after it.

    ``length`` [batch] is the slot of the first new token, ``causal`` names an input that is promised to be
    lower-triangular.
    """
    placed = _placed(mask)
    if placed is None:
        raise Unfit("its mask is not made by cache_mask, so nothing says what it hides")
    if placed.inputs[2] is not length:
        raise Unfit("its mask has the new tokens in other slots than its cache")
    view = input_at(placed, 1).producer()
    own = input_at(view, 2) if view is not None and view.op_type in _VIEWS else None
    if own is None or not _is_causal(own, causal):
        raise Unfit("its mask may let a new token see a later one, which the kernel hides")


def _placed(mask: ir.Value) -> ir.Node | None:
    """The ``cache_mask`` that a mask is, or hides more than."""
    node = mask.producer()
    if node is None:
        return None
    if node.op_type == "cache_mask":
        return node
    if node.op_type == "Expand":
        return _placed(input_at(node, 0))
    if node.op_type == "And":
        return _placed(input_at(node, 0)) or _placed(input_at(node, 1))
    return None


def _is_causal(own: ir.Value, causal: str | None) -> bool:
    """Whether a mask [batch, tokens, tokens] is lower-triangular, or an input that is promised to be."""
    if _square(own) == (1, 1):
        return True  # of a single new token there is no later one
    if own.is_graph_input():
        return own.name == causal
    if own.const_value is not None:
        return not np.triu(array(own), 1).any()
    node = own.producer()
    if node is None or node.op_type not in ("And", "Expand", "Identity"):
        return False
    given = node.inputs if node.op_type == "And" else node.inputs[:1]
    return any(one is not None and _square(one) == _square(own) and _is_causal(one, causal) for one in given)


def _square(own: ir.Value) -> tuple[object, ...] | None:
    """The sizes of the last two axes; what is repeated along them has others."""
    sizes = tuple(own.shape)[-2:] if own.shape is not None else ()
    known = [size if isinstance(size, int) else size.value for size in sizes]
    return tuple(known) if len(known) == 2 and None not in known else None
