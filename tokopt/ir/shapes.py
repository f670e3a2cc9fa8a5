"""Shapes and dtypes of an open graph, as functions of the signature's named axes.

Every named axis is one symbol, so axes of one name are one size and axes of two names are never taken for one. A
value's shape is derived by running its operator on tensors without data (FakeTensors).
"""

# sympy is untyped, and so is what torch says of its symbols.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportPrivateUsage=false

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from threading import get_ident
from typing import Any, cast
from weakref import ReferenceType, ref

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils._sympy.functions import Mod, PythonMod
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy
from torch.utils.weak import WeakIdKeyDictionary

from tokopt.errors import PassError
from tokopt.ir.export import copied, placeholders
from tokopt.ir.graph import function_of, is_group
from tokopt.ir.program import AxisRange, Program, TensorSpec

_KEY = "tokopt.shapes"

_REMEMBERED = 2048
"""Answers that graphs with the same axes share, at most: enough for a model's blocks and the passes on it."""

_SMALLEST = 2
"""``torch.export`` proves graphs for sizes from 2, since some operators take an axis of size 1 for one to broadcast."""


class Symbols:
    """The symbols that graphs with the same axes share, so that what was derived for one need not be for another.

    What may be taken for granted of a symbol differs from graph to graph: that of the one being edited holds.
    """

    def __init__(self) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.mode.cache_enabled = False  # with symbols, an entry costs more than running the operator again
        self._made: dict[tuple[str, int], torch.SymInt] = {}
        self._answers: OrderedDict[object, Any] = OrderedDict()
        self._constants = WeakIdKeyDictionary()
        self._last: ReferenceType[Shapes] | None = None  # weak: a graph that nobody else holds has to go

    @property
    def active(self) -> Shapes | None:
        """The shapes of the graph that is being edited."""
        return None if self._last is None else self._last()

    def symbol(self, axis: str, size: int) -> torch.SymInt:
        """The symbol of an axis that has ``size`` in the example."""
        if (axis, size) not in self._made:
            self._made[axis, size] = self._make(axis, size)
        return self._made[axis, size]

    def _make(self, axis: str, size: int) -> torch.SymInt:
        source = ConstantSource(f"{axis}_{len(self._made) + 1}")
        symbol = self.env.create_symbol(
            size, source, dynamic_dim=DimDynamic.DYNAMIC, do_not_specialize_zero_one=True, positive=True
        )
        made = self.env.create_symintnode(symbol, hint=size, source=source)
        assert isinstance(made, torch.SymInt)
        return made

    def constant(self, value: Tensor) -> Tensor:
        """A parameter without its data."""
        if value not in self._constants:
            self._constants[value] = self.mode.from_tensor(value, static_shapes=True)
        return self._constants[value]

    def answer(self, question: object) -> Any:
        """What :meth:`remember` was told lately; None otherwise."""
        if question not in self._answers:
            return None
        self._answers.move_to_end(question)
        return self._answers[question]

    def remember(self, question: object, answer: object) -> None:
        """Keep an answer, and forget the one that nobody has asked for longest when there are too many."""
        self._answers[question] = answer
        if len(self._answers) > _REMEMBERED:
            self._answers.popitem(last=False)

    def activate(self, shapes: Shapes) -> FakeTensorMode:
        """Let what one graph says of the symbols hold from now on."""
        active = self.active
        if active is not shapes:
            if active is not None:
                active.bounds = active.narrowed()
                active.guards += self.env.guards
            self._last = ref(shapes)
            self.env.guards.clear()
            self.env.replacements.clear()
            for axis, bounds in shapes.bounds.items():
                self.bound(shapes.axes[axis], bounds)
        return self.mode

    def bound(self, size: torch.SymInt, bounds: AxisRange) -> None:
        """Let edits from now on take for granted that a symbol is within ``bounds``."""
        self.env.var_to_range[_symbol(size)] = _value_range(bounds)
        self.env._update_version_counter()

    def found(self, axis: str, size: torch.SymInt, declared: AxisRange) -> AxisRange:
        """The declared range of a symbol, narrowed by what edits took for granted; raises PassError."""
        symbol = _symbol(size)
        if symbol in self.env.replacements:
            fixed = self.env.replacements[symbol]
            raise PassError(f"an edit takes for granted that {axis} is {fixed}; capture with a fixed {axis}")
        known = self.env.var_to_range[symbol]
        low = int(known.lower) if known.lower > max(_SMALLEST, declared.min) else declared.min
        high = None if known.upper >= int_oo else int(known.upper)
        return AxisRange(low, declared.max if high is None else min(high, declared.max or high))


@lru_cache(maxsize=8)
def _symbols(sizes: tuple[tuple[str, int], ...], thread: int) -> Symbols:
    """The symbols that all graphs of one thread with axes of these names and sizes share."""
    return Symbols()


_Calls = dict[tuple[Callable[..., Any], tuple[Any, ...]], Any]


@dataclass(eq=False)
class Shapes:
    """What is known of the values of one open graph.

    ``axes`` are the symbols of the named axes, ``bounds`` their ranges, ``guards`` what edits took for granted of them,
    and ``calls`` what :func:`tokopt.rewrite.edit.call_once` inserted.
    """

    symbols: Symbols
    axes: dict[str, torch.SymInt] = field(default_factory=dict[str, torch.SymInt])
    bounds: dict[str, AxisRange] = field(default_factory=dict[str, AxisRange])
    guards: list[Any] = field(default_factory=list[Any])
    calls: _Calls = field(default_factory=_Calls)
    _known: dict[Node, _Made] = field(default_factory=dict[Node, "_Made"])
    _derived: dict[object, Any] = field(default_factory=dict[object, Any])

    @classmethod
    def of(
        cls, inputs: Sequence[TensorSpec], ranges: Mapping[str, AxisRange], example: Sequence[Tensor]
    ) -> Shapes:
        """Symbols for the named axes of a signature, with the example's sizes as hints."""
        sizes = {
            axis: size
            for spec, tensor in zip(inputs, example, strict=True)
            for axis, size in zip(spec.axes, tensor.shape, strict=True)
            if isinstance(axis, str)
        }
        shapes = cls(_symbols(tuple(sizes.items()), get_ident()))
        for spec, tensor in zip(inputs, example, strict=True):
            shapes.name(spec, tensor, ranges)
        return shapes

    @staticmethod
    def attached(module: GraphModule) -> Shapes:
        """The shapes of an open graph."""
        return module.meta[_KEY]

    @staticmethod
    def find(module: GraphModule) -> Shapes | None:
        """The shapes of a graph that was open once."""
        return module.meta.get(_KEY)

    def attach(self, module: GraphModule) -> None:
        """Make these the shapes of a graph."""
        module.meta[_KEY] = self

    def derive(self, module: GraphModule, ranges: Mapping[str, AxisRange]) -> None:
        """Attach shapes with the same symbols to a copy of this graph, whose values are all known."""
        bounds = {axis: ranges[axis] for axis in self.axes if axis in ranges}
        axes = {axis: self.axes[axis] for axis in bounds}
        known = {
            node: _Made.of(node) for node in module.graph.nodes if node.op not in ("placeholder", "output")
        }
        Shapes(self.symbols, axes, bounds, _known=known).attach(module)

    def name(self, spec: TensorSpec, tensor: Tensor, ranges: Mapping[str, AxisRange]) -> None:
        """Give the named axes of an input, of which ``tensor`` is an example, their symbols."""
        for axis, size in zip(spec.axes, tensor.shape, strict=True):
            if isinstance(axis, str) and axis not in self.axes:
                self.axes[axis] = self.symbols.symbol(axis, size)
                self.bounds[axis] = ranges.get(axis, AxisRange())
                if self.symbols.active is self:
                    self.symbols.bound(self.axes[axis], self.bounds[axis])

    def fits(self, inputs: Sequence[TensorSpec], example: Sequence[Tensor]) -> bool:
        """Whether the symbols' hints are the sizes of this example."""
        return all(
            not isinstance(axis, str) or (axis in self.axes and self.axes[axis].node.hint == size)
            for spec, tensor in zip(inputs, example, strict=True)
            for axis, size in zip(spec.axes, tensor.shape, strict=True)
        )

    def narrow(self, axis: str, bounds: AxisRange) -> None:
        """Let edits from now on take for granted that an axis is within ``bounds``."""
        self.active()
        self.symbols.bound(self.axes[axis], bounds)

    def narrowed(self) -> dict[str, AxisRange]:
        """The ranges of all axes, narrowed by what edits took for granted; raises PassError."""
        self.active()
        return {axis: self.symbols.found(axis, size, self.bounds[axis]) for axis, size in self.axes.items()}

    def proved(self) -> dict[str, AxisRange]:
        """The ranges of all axes, within which everything that edits took for granted holds.

        Raises PassError where no range says it.
        """
        ranges = self.narrowed()
        symbols = {_symbol(size): axis for axis, size in self.axes.items()}
        for guard in (*self.guards, *self.symbols.env.guards):
            ranges = _holding(guard.expr, symbols, ranges)
        return ranges

    def always(self, relation: Any) -> bool:
        """Whether intervals prove a relation between the named axes for every size in their ranges."""
        known = {
            _symbol(size): ValueRanges(bounds.min, int_oo if bounds.max is None else bounds.max)
            for size, bounds in ((self.axes[axis], self.bounds[axis]) for axis in self.axes)
        }
        if relation.free_symbols <= known.keys():
            return _proved(relation, known)
        return False

    def active(self) -> FakeTensorMode:
        """The mode in which this graph's functions run without data."""
        return self.symbols.activate(self)

    def once(
        self, question: object, derive: Callable[[], Any], makes_symbols: Callable[[Any], object]
    ) -> Any:
        """What ``derive()`` says of the symbols, or what was said to this question before.

        It was asked for this graph, or for another of the same symbols of which the same was taken for granted, if the
        answer takes nothing for granted by itself. An answer that ``makes_symbols`` is never given twice.
        """
        if question in self._derived:
            return self._derived[question]
        self.active()
        granted = self._granted()
        answer = self.symbols.answer((question, granted))
        if answer is None:
            answer = derive()
            if makes_symbols(answer):
                return answer
            if self._granted() == granted:
                self.symbols.remember((question, granted), answer)
        self._derived[question] = answer
        return answer

    def _granted(self) -> object:
        """All that is taken for granted of the symbols now."""
        env, symbols = self.symbols.env, [_symbol(size) for size in self.axes.values()]
        ranges = tuple((symbol, env.var_to_range[symbol]) for symbol in symbols)
        return ranges, tuple(env.replacements.items()), tuple(guard.expr for guard in env.guards)

    def constraints(self) -> dict[Any, ValueRanges[Any]]:
        """The range of every symbol, as an ExportedProgram says them."""
        self.active()
        return {_symbol(size): self.symbols.env.var_to_range[_symbol(size)] for size in self.axes.values()}

    def blank(self, spec: TensorSpec) -> Tensor:
        """A tensor of an input's shape and dtype, without data."""
        with self.active():
            return torch.empty(
                [self.axes[axis] if isinstance(axis, str) else axis for axis in spec.axes],
                dtype=getattr(torch, spec.dtype),
            )

    def refresh(self, module: GraphModule, until: Node | None = None) -> None:
        """Derive anew what depends on an edit, from the graph's beginning to ``until`` (without it).

        A node is run again only where its operands are not what they were; one whose value is of the same shape and
        dtype as before keeps it, and so do those that follow.
        """
        for node in module.graph.nodes:
            if node is until:
                return
            if node.op not in ("placeholder", "output"):
                self.renew(module, node)

    def derived(self, nodes: Iterable[Node]) -> None:
        """Take the values of new nodes as they are: they were derived from what their operands are now."""
        self._known.update((node, _Made.of(node)) for node in nodes)

    def renew(self, module: GraphModule, node: Node) -> None:
        """Derive one node's value anew, from operands whose values are right."""
        made = _Made.of(node)
        known = self._known.get(node)
        if known is not None and known.same(made):
            return
        if node.op == "get_attr":
            value = attribute(module, node)
            node.meta["val"] = self.symbols.constant(value) if isinstance(value, Tensor) else value
        else:
            assert node.op == "call_function", f"{node.format_node()} is no call of a function"
            value = self._value(node)
            if not (known is not None and _alike(value, node.meta.get("val"))):
                node.meta["val"] = value
        self._known[node] = made

    def _value(self, node: Node) -> Any:
        """What a node gives without data: what one like it gave, where there is one."""
        function = function_of(node)
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])

        def run() -> Any:
            # Without Python's dispatcher some operators take symbols for the example's sizes.
            with torch.no_grad(), self.active(), enable_python_dispatcher():
                value = function(*args, **kwargs)
            # Numbers that it read off tensors are in its value, and the next trace would look for them in its own.
            self.symbols.env.pending_fresh_unbacked_symbols.clear()
            return value

        question = (function, described(args), described(tuple(kwargs.items())))
        return self.once(question, run, free_unbacked_symbols)


@dataclass(frozen=True)
class _Made:
    """What a node's value was derived from."""

    target: object
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[object, ...]

    @classmethod
    def of(cls, node: Node) -> _Made:
        return cls(
            node.target, node.args, node.kwargs, tuple(n.meta.get("val") for n in node.all_input_nodes)
        )

    def same(self, other: _Made) -> bool:
        return (
            self.target is other.target
            and all(a is b for a, b in zip(self.operands, other.operands, strict=False))
            and self.args == other.args
            and self.kwargs == other.kwargs
        )


def _holding(expr: Any, symbols: Mapping[Any, str], ranges: dict[str, AxisRange]) -> dict[str, AxisRange]:
    """The ranges, narrowed to where an expression holds; raises PassError where no range says it."""
    if not expr.free_symbols <= symbols.keys():
        return ranges
    known = {symbol: _value_range(ranges[axis]) for symbol, axis in symbols.items() if axis in ranges}
    if _is_true(expr, known):
        return ranges
    if len(expr.free_symbols) != 1:
        axes = sorted(repr(symbols[symbol]) for symbol in expr.free_symbols)
        raise PassError(
            f"an edit fits only some sizes of the axes {' and '.join(axes)}, and no range of one axis says which; "
            "capture with one of them fixed"
        )
    (symbol,) = expr.free_symbols
    axis = symbols[symbol]
    low, high = max(ranges[axis].min, _SMALLEST), ranges[axis].max
    sizes = range(low, min(high or _LONGEST, _LONGEST) + 1)
    failing = [size for size, holds in zip(sizes, _at(expr, symbol, sizes), strict=True) if not holds]
    if not failing:
        return ranges
    if failing[-1] == sizes[-1] or len(failing) != failing[-1] - low + 1:
        raise PassError(
            f"an edit does not fit {axis}={failing[0]}, and no range leaves out all sizes that it does not fit; "
            f"capture with a fixed {axis}"
        )
    return {**ranges, axis: AxisRange(failing[-1] + 1, high)}


Known = dict[Any, ValueRanges[Any]]


def _is_true(expr: Any, known: Known) -> bool:
    """Whether intervals prove an expression: as it is, or as the sign of a product."""
    for kind in (Mod, PythonMod):
        expr = expr.replace(kind, partial(_remainder, kind, known))
    if _proved(expr, known):
        return True
    if isinstance(expr, sympy.Or | sympy.And):
        together = any if isinstance(expr, sympy.Or) else all
        return together(_is_true(part, known) for part in expr.args)
    if not expr.is_Relational:
        return False
    if _proved(*_factors_bounded(expr, known)):
        return True
    difference: Any = sympy.factor(sympy.Add(expr.lhs, sympy.Mul(-1, expr.rhs)))
    return _proved(type(expr)(difference, 0), known)


def _factors_bounded(expr: Any, known: Known) -> tuple[Any, Known]:
    """The relation with a new symbol for every factor of one axis, whose interval is what the factor takes.

    An interval of ``tokens - ceil(tokens / 2)`` is too wide where its terms are bounded one by one.
    """
    known = dict(known)

    sides = ([_bounded(factor, known) for factor in sympy.Mul.make_args(side)] for side in expr.args)
    return type(expr)(*(sympy.Mul(*factors) for factors in sides)), known


def _bounded(factor: Any, known: Known) -> Any:
    if factor.is_Symbol or len(factor.free_symbols) != 1:
        return factor
    (symbol,) = factor.free_symbols
    low, high = int(known[symbol].lower), known[symbol].upper
    sizes = range(low, (_LONGEST if high >= int_oo else min(int(high), _LONGEST)) + 1)
    values = [int(value) for value in _at(factor, symbol, sizes)]
    made = sympy.Dummy(integer=True, positive=min(values) > 0)
    known[made] = ValueRanges(min(values), max(values) if high <= _LONGEST else int_oo)
    return made


def _at(expr: Any, symbol: Any, sizes: range) -> list[Any]:
    """What an expression of one symbol is at every size.

    It is computed as Python, as torch itself computes guards; sympy takes a second for what this does in a millisecond.
    """
    source = PythonPrinter().doprint(expr.xreplace({symbol: sympy.Symbol("size", integer=True)}))
    try:
        function = eval(f"lambda size: {source}", {"math": math, "torch": torch})
        return [function(size) for size in sizes]
    except (NameError, SyntaxError, TypeError):  # a function that has no spelling in Python
        values = (expr.xreplace({symbol: sympy.Integer(size)}) for size in sizes)
        return [value == sympy.true if isinstance(expr, Boolean) else value for value in values]


def _proved(expr: Any, known: Known) -> bool:
    return expr == sympy.true or bound_sympy(expr, known).lower == sympy.true


def _remainder(kind: Any, known: Known, part: Any, whole: Any) -> Any:
    """``part mod whole``: 0 for a multiple, and ``part`` where that is positive and the smaller one."""
    if _is_multiple(part, whole):
        return sympy.Integer(0)
    positive = [sympy.Gt(sympy.factor(x), 0) for x in (part, whole - part)]
    return part if all(_proved(one, known) for one in positive) else kind(part, whole)


def _is_multiple(part: Any, whole: Any) -> bool:
    """Whether ``part`` is ``whole`` times a polynomial of whole numbers."""
    quotient: Any = sympy.expand(sympy.cancel(part / whole))
    return quotient.is_polynomial() and all(n.is_integer for n in quotient.as_coefficients_dict().values())


_LONGEST = 4096
"""Up to here what no interval arithmetic proves is tried at every size."""


def _value_range(bounds: AxisRange) -> ValueRanges[Any]:
    return ValueRanges(max(bounds.min, _SMALLEST), int_oo if bounds.max is None else bounds.max)


def _symbol(size: torch.SymInt) -> Any:
    return cast(Any, size).node._expr


def attribute(module: GraphModule, node: Node) -> Any:
    """What a ``get_attr`` node reads."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _alike(a: object, b: object) -> bool:
    """Whether two values have the same shape, strides and dtype."""
    if is_group(a) and is_group(b):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and str(a.shape) == str(b.shape) and str(a.stride()) == str(b.stride())
    return type(a) is type(b) and str(a) == str(b)


def described(value: object) -> object:
    """What values that operators treat alike have in common: type, dtype, and sizes as functions of the symbols."""
    if isinstance(value, Tensor):
        return value.dtype, value.device, described(tuple(value.shape)), described(value.stride())
    if isinstance(value, tuple | list):
        return type(value), tuple(described(item) for item in cast("Sequence[object]", value))
    if isinstance(value, slice):
        return slice, described((value.start, value.stop, value.step))
    node = getattr(value, "node", None)
    return type(value), value if node is None else node.expr


def with_shapes(program: Program) -> GraphModule:
    """The program's graph, its shapes functions of its named axes; derived once for all that ask."""
    known = Shapes.find(program.module)
    if known is not None and known.fits(program.inputs, program.example):
        return program.module
    key = f"{_KEY} {[tuple(tensor.shape) for tensor in program.example]}"
    if key not in program.module.meta:
        module = copied(program.module)
        shapes = Shapes.of(program.inputs, program.ranges, program.example)
        shapes.attach(module)
        for node, spec in zip(placeholders(module), program.inputs, strict=True):
            node.meta["val"] = shapes.blank(spec)
        shapes.refresh(module)
        program.module.meta[key] = module
    return program.module.meta[key]


def sizes_at(module: GraphModule, axes: Mapping[str, int]) -> Callable[[Any], int]:
    """The number that a size of a graph :func:`with_shapes` is when its named axes have these sizes.

    Axes that are not given have the example's size.
    """
    known = {
        _symbol(size): sympy.Integer(axes.get(axis, size.node.hint))
        for axis, size in Shapes.attached(module).axes.items()
    }
    found: dict[Any, int] = {}

    def number(size: Any) -> int:
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr not in found:
            found[expr] = int(expr.xreplace(known))
        return found[expr]

    return number
