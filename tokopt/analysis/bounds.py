"""What the elements of a tensor can be that is computed from sizes and parameters alone, at every size allowed.

Between which values every element lies is derived operator by operator, as functions of the named axes' sizes: the
elements of ``arange(tokens)`` are between 0 and ``tokens - 1``. Nothing is tried at chosen sizes. An operator without a
rule ends the derivation, and so does anything that depends on an input's values.
"""

# sympy is untyped.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokopt.analysis.constants import evaluate
from tokopt.ir.graph import argument, aten, is_call
from tokopt.ir.shapes import Shapes


@dataclass(frozen=True)
class Bounds:
    """No element is below ``low`` or above ``high``, which are functions of the named axes; booleans are 0 and 1."""

    low: Any
    high: Any


def bounds(module: GraphModule, node: Node) -> Bounds | None:
    """Between what the elements of an open graph's node lie, None where it is not known."""
    return _Derivation(module).of(node)


class _Derivation:
    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.shapes = Shapes.attached(module)
        self.known: dict[Node, Bounds | None] = {}

    def of(self, given: object) -> Bounds | None:
        """The bounds of a node or a number."""
        if isinstance(given, (bool, int, float)):
            return Bounds(_number(given), _number(given))
        if not isinstance(given, Node):
            return None
        if given not in self.known:
            self.known[given] = self._derived(given)
        return self.known[given]

    def _derived(self, node: Node) -> Bounds | None:
        value = node.meta["val"]
        if isinstance(value, torch.SymInt):
            size = cast(Any, value).node.expr
            return Bounds(size, size)
        if not isinstance(value, Tensor) or node.op == "placeholder":
            return None
        if _is_fixed(node):
            return _extremes(evaluate(self.module, node, {}))
        for targets, rule in _RULES:
            if is_call(node, *targets):
                found = rule(self, node)
                return None if found is None or sympy.nan in (found.low, found.high) else found
        return None

    def operands(self, node: Node, count: int) -> list[Bounds] | None:
        """The bounds of the first operands, None where one is not known."""
        found = [self.of(given) for given in node.args[:count]]
        known = [one for one in found if one is not None]
        return known if len(known) == count else None

    def below(self, a: Any, b: Any, *, strict: bool) -> bool:
        """Whether ``a`` is below ``b`` (or, unless ``strict``, equal) at every size allowed."""
        relation = sympy.Lt(a - b, 0) if strict else sympy.Le(a - b, 0)
        return self.shapes.always(relation)


Rule = Callable[[_Derivation, Node], Bounds | None]


def _number(value: float) -> Any:
    """A number for sympy, to which 1.0 and 1 are not the same one."""
    whole = isinstance(value, int) or (math.isfinite(value) and value.is_integer())
    return sympy.Integer(int(value)) if whole else sympy.sympify(value)


def _is_fixed(node: Node) -> bool:
    """Whether a tensor is the same one whatever the sizes and the inputs are."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current.op == "placeholder" or isinstance(current.meta["val"], torch.SymInt):
            return False
        new = [given for given in current.all_input_nodes if given not in seen]
        seen.update(new)
        stack.extend(new)
    return True


def _extremes(value: Tensor) -> Bounds | None:
    if not value.numel() or value.is_complex() or value.isnan().any():
        return None
    return Bounds(_number(value.min().item()), _number(value.max().item()))


_TRUE, _FALSE, _EITHER = (Bounds(_number(low), _number(high)) for low, high in ((1, 1), (0, 0), (0, 1)))


# --- operators that make values ---------------------------------------------------------------------------


def _arange(derivation: _Derivation, node: Node) -> Bounds | None:
    given = [derivation.of(value) for value in node.args]
    if None in given or not _is_integer(node) or is_call(node, aten.arange.start_step):
        return None
    ends = [one for one in given if one is not None]
    start = ends[0].low if len(ends) > 1 else _number(0)
    return Bounds(start, ends[-1].high - 1)


def _is_integer(node: Node) -> bool:
    dtype = node.meta["val"].dtype
    return not dtype.is_floating_point and not dtype.is_complex


def _filled(value: float) -> Rule:
    return lambda derivation, node: derivation.of(value)


def _full(derivation: _Derivation, node: Node) -> Bounds | None:
    return derivation.of(argument(node, 1 if is_call(node, aten.full, aten.full_like) else 2, "fill_value"))


# --- operators that take values from where they are -------------------------------------------------------


def _same(derivation: _Derivation, node: Node) -> Bounds | None:
    return derivation.of(node.args[0])


def _joined(derivation: _Derivation, node: Node) -> Bounds | None:
    return _hull(derivation, argument(node, 0, "tensors"))


def _scattered(derivation: _Derivation, node: Node) -> Bounds | None:
    return _hull(derivation, node.args[:2])


def _padded(derivation: _Derivation, node: Node) -> Bounds | None:
    value = argument(node, 2 if is_call(node, aten.constant_pad_nd) else 3, "value", 0) or 0
    return _hull(derivation, (node.args[0], value))


def _or_zero(derivation: _Derivation, node: Node) -> Bounds | None:
    return _hull(derivation, (node.args[0], 0))


def _hull(derivation: _Derivation, given: Sequence[object]) -> Bounds | None:
    """The bounds of elements that come from any of several tensors or numbers."""
    found = [derivation.of(one) for one in given]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    return Bounds(sympy.Min(*(one.low for one in known)), sympy.Max(*(one.high for one in known)))


def _cast(derivation: _Derivation, node: Node) -> Bounds | None:
    """A conversion that rounds nothing which a comparison could tell."""
    given = derivation.of(node.args[0])
    dtype = node.meta["val"].dtype
    if given is None:
        return None
    if dtype == torch.bool:
        return _not(_equal(derivation, given, _FALSE))
    if dtype in (torch.float32, torch.float64) or given.low == given.high:
        return given
    source = node.args[0]
    wide = dtype in (torch.int32, torch.int64) and isinstance(source, Node) and _is_integer(source)
    return given if wide else None


# --- arithmetic -------------------------------------------------------------------------------------------


def _add(derivation: _Derivation, node: Node) -> Bounds | None:
    sign = 1 if is_call(node, aten.add) else -1
    operands = derivation.operands(node, 2)
    if operands is None or argument(node, 2, "alpha", 1) != 1:
        return None
    a, b = reversed(operands) if is_call(node, aten.rsub) else operands
    return Bounds(a.low + b.low, a.high + b.high) if sign == 1 else Bounds(a.low - b.high, a.high - b.low)


def _mul(derivation: _Derivation, node: Node) -> Bounds | None:
    operands = derivation.operands(node, 2)
    if operands is None:
        return None
    for factor, other in (operands, reversed(operands)):
        if factor.low == factor.high and factor.low.is_number:
            ends = (factor.low * other.low, factor.low * other.high)
            return Bounds(*(reversed(ends) if factor.low < 0 else ends))
    return None


def _abs(derivation: _Derivation, node: Node) -> Bounds | None:
    given = derivation.of(node.args[0])
    if given is None or derivation.below(0, given.low, strict=False):
        return given
    return Bounds(_number(0), sympy.Max(-given.low, given.high))


# --- truth ------------------------------------------------------------------------------------------------


def _less(strict: bool, swapped: bool) -> Rule:
    """``a < b``, or ``a <= b`` unless ``strict``; ``swapped`` for ``>`` and ``>=``."""

    def rule(derivation: _Derivation, node: Node) -> Bounds | None:
        operands = derivation.operands(node, 2)
        if operands is None:
            return None
        a, b = reversed(operands) if swapped else operands
        if derivation.below(a.high, b.low, strict=strict):
            return _TRUE
        return _FALSE if derivation.below(b.high, a.low, strict=not strict) else _EITHER

    return rule


def _equality(wanted: bool) -> Rule:
    def rule(derivation: _Derivation, node: Node) -> Bounds | None:
        operands = derivation.operands(node, 2)
        if operands is None:
            return None
        equal = _equal(derivation, *operands)
        return equal if wanted else _not(equal)

    return rule


def _equal(derivation: _Derivation, a: Bounds, b: Bounds) -> Bounds:
    if a.low == a.high == b.low == b.high:
        return _TRUE
    apart = derivation.below(a.high, b.low, strict=True) or derivation.below(b.high, a.low, strict=True)
    return _FALSE if apart else _EITHER


def _not(given: Bounds) -> Bounds:
    return Bounds(1 - given.high, 1 - given.low)


def _negated(derivation: _Derivation, node: Node) -> Bounds | None:
    given = derivation.of(node.args[0])
    return _not(given) if given is not None and node.meta["val"].dtype == torch.bool else None


def _both(derivation: _Derivation, node: Node) -> Bounds | None:
    """``and``: false where one is false, whatever is known of the other."""
    found = _truths(derivation, node)
    return (
        None
        if found is None
        else Bounds(sympy.Min(*(one.low for one in found)), sympy.Min(*(one.high for one in found)))
    )


def _any(derivation: _Derivation, node: Node) -> Bounds | None:
    """``or``: true where one is true, whatever is known of the other."""
    found = _truths(derivation, node)
    return (
        None
        if found is None
        else Bounds(sympy.Max(*(one.low for one in found)), sympy.Max(*(one.high for one in found)))
    )


def _truths(derivation: _Derivation, node: Node) -> list[Bounds] | None:
    """The operands of a connective of booleans; what is not known of one may be either."""
    if node.meta["val"].dtype != torch.bool:
        return None
    return [derivation.of(given) or _EITHER for given in node.args[:2]]


def _where(derivation: _Derivation, node: Node) -> Bounds | None:
    condition, chosen, otherwise = node.args
    return _choice(derivation, condition, chosen, otherwise)


def _masked_fill(derivation: _Derivation, node: Node) -> Bounds | None:
    kept, condition, filled = node.args
    return _choice(derivation, condition, filled, kept)


def _choice(derivation: _Derivation, condition: object, chosen: object, otherwise: object) -> Bounds | None:
    truth = derivation.of(condition)
    if truth in (_TRUE, _FALSE):
        return derivation.of(chosen if truth == _TRUE else otherwise)
    return _hull(derivation, (chosen, otherwise))


_RULES: list[tuple[tuple[object, ...], Rule]] = [
    ((aten.arange,), _arange),
    ((aten.ones, aten.ones_like, aten.new_ones), _filled(1)),
    ((aten.zeros, aten.zeros_like, aten.new_zeros), _filled(0)),
    ((aten.full, aten.full_like, aten.new_full), _full),
    (
        (
            aten.view,
            aten.reshape,
            aten._unsafe_view,
            aten.flatten,
            aten.unflatten,
            aten.unsqueeze,
            aten.squeeze,
        )
        + (
            aten.expand,
            aten.expand_as,
            aten.repeat,
            aten.transpose,
            aten.t,
            aten.permute,
            aten.flip,
            aten.roll,
        )
        + (aten.slice, aten.select, aten.index, aten.gather, aten.index_select)
        + (aten.clone, aten.contiguous, aten.alias, aten.detach, aten.lift_fresh_copy),
        _same,
    ),
    ((aten.fill,), lambda derivation, node: derivation.of(node.args[1])),
    ((aten.cat, aten.stack), _joined),
    ((aten.slice_scatter, aten.select_scatter), _scattered),
    ((aten.pad, aten.constant_pad_nd), _padded),
    ((aten.tril, aten.triu), _or_zero),
    ((aten.to, aten._to_copy, aten.type_as), _cast),
    ((aten.add, aten.sub, aten.rsub), _add),
    ((aten.mul,), _mul),
    ((aten.abs,), _abs),
    ((aten.lt,), _less(strict=True, swapped=False)),
    ((aten.le,), _less(strict=False, swapped=False)),
    ((aten.gt,), _less(strict=True, swapped=True)),
    ((aten.ge,), _less(strict=False, swapped=True)),
    ((aten.eq,), _equality(True)),
    ((aten.ne,), _equality(False)),
    ((aten.logical_not, aten.bitwise_not), _negated),
    ((aten.logical_and, aten.bitwise_and, aten.__and__), _both),
    ((aten.logical_or, aten.bitwise_or, aten.__or__), _any),
    ((aten.where,), _where),
    ((aten.masked_fill,), _masked_fill),
]
