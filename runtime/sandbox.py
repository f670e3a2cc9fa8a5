"""A Jinja environment for the templates of strangers: no access to Python, bounded memory and bounded time.

Jinja's own sandbox keeps a template away from Python's internals and from changing what it is given, but not from
``'a' * 10**9``. Here everything that makes a value or repeats a step is paid for out of one budget, and no single value
may be larger than a limit, before it is made: operators, calls, filters, tests and output by Jinja's hooks, and
comparisons, displays, concatenations and the bodies of loops and macros by calls that are put into the syntax tree.
"""

# jinja2 leaves its filters, tests and nodes untyped, and the parameters of a lambda cannot be annotated.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import functools
import json
import re
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from contextvars import ContextVar
from datetime import datetime
from operator import length_hint
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tokopt.errors import InputError

LARGEST = 2**22
"""Characters of the largest value, to which 16 for each character of the input are added."""

BUDGET = 2**24
"""Characters of all values together, to which 512 for each character of the input are added."""

NODE = 32
"""What an element of a list, a step of a loop or a call costs, in characters."""


def render_template(template: str, given: Mapping[str, Any]) -> str:
    """The text of a template with the variables ``given``, whose size the limits grow with.

    Raises InputError beyond the limits, and whatever Jinja and Python raise on a faulty template.
    """
    token = _BUDGET.set(_Budget(_size(given, 2**40)))
    try:
        return _compiled(template).render(given)
    finally:
        _BUDGET.reset(token)


class _Budget:
    """What one rendering may still cost."""

    def __init__(self, given: int) -> None:
        self.largest, self.left = LARGEST + 16 * given, BUDGET + 512 * given

    def charge(self, amount: int) -> None:
        """Pay for ``amount`` characters or raise InputError."""
        amount = max(int(amount), 0)  # int refuses NaN, after which every comparison would be false
        if amount > self.largest:
            raise InputError(f"the chat template makes a value of more than {self.largest} characters")
        self.left -= amount
        if self.left < 0:
            raise InputError("the chat template takes more steps or memory than a conversation needs")


_BUDGET: ContextVar[_Budget] = ContextVar("budget")


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    return _Environment().from_string(template)


class _Environment(ImmutableSandboxedEnvironment):
    """An environment with the filters, tags and functions of transformers' chat templates."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControlExtension]
        )
        self.globals.update(
            raise_exception=_raise,
            strftime_now=lambda format: datetime.now().strftime(format),
            dict=_Dict(),
            namespace=_Namespace,
        )
        del self.globals["lipsum"]  # random text of any length
        self.filters.update(tojson=self._to_json, sum=_sum)
        self.finalize = self.weighed
        for name in self.filters.keys() - _FREE_FILTERS:
            self.filters[name] = self._paid(self.filters[name], _FILTER_COSTS.get(name))
        for name in _PAID_TESTS:
            self.tests[name] = self._paid(self.tests[name])

    # ------------------------------------------------------------------------------------------- the budget

    def charge(self, amount: int) -> None:
        """Pay for ``amount`` characters."""
        _BUDGET.get().charge(amount)

    def weighed(self, value: Any) -> Any:
        """``value``, paid for."""
        self.charge(self.weigh(value))
        return value

    def weigh(self, value: Any) -> int:
        """What ``value`` costs, as :func:`_size` says; more than the largest size is not counted further."""
        return _size(value, _BUDGET.get().largest)

    def each(self, items: Iterable[Any]) -> Iterable[Any]:
        """What a loop goes over, with its steps paid for."""
        self.charge(NODE * length_hint(items, 1))
        return items

    # -------------------------------------------------------------------------------------- Jinja's hooks

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = Parser(self, source, name, filename).parse()
        _instrument(template)
        template.set_environment(self)
        return template

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call ``function``, with its arguments and its result paid for."""
        if getattr(function, "__self__", None) is self:  # put into the syntax tree by _instrument
            return function(*args)
        if isinstance(function, Macro):  # its body is paid for
            return self.weighed(super().call(context, function, *args, **kwargs))
        named = {key: value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")}
        self.charge(NODE + self.weigh((args, named)))
        method = getattr(function, "__wrapped__", function)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes, int)) and (cost := _METHOD_COSTS.get(method.__name__)):
            self.charge(cost(owner, *args, **named))
        return self.weighed(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator, with its operands and its result paid for."""
        self.charge(self.weigh((left, right)))
        self.charge(_operator_cost(operator, left, right))
        return self.weighed(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Subscript: a slice is a copy, and a key that is no string or number is hashed and compared."""
        if isinstance(argument, slice):
            self.charge(length_hint(obj, 1) * (1 if isinstance(obj, (str, bytes)) else NODE))
        elif not isinstance(argument, (str, int)):
            self.charge(self.weigh(argument))
        return super().getitem(obj, argument)

    def _paid(
        self, function: Callable[..., Any], cost: Callable[..., int] | None = None
    ) -> Callable[..., Any]:
        """A filter or a test with its arguments and its result paid for.

        An iterator is gone through at once: a chain of lazy ones could be of any depth. It stays an iterator, which
        is true even if it is empty.
        """
        hidden = hasattr(function, "jinja_pass_arg")  # the first argument is the context or the environment

        @functools.wraps(function)
        def paid(*args: Any, **kwargs: Any) -> Any:
            given = args[1:] if hidden else args
            self.charge(NODE + self.weigh((given, kwargs)))
            if cost:
                self.charge(cost(*given, **kwargs))
            result = function(*args, **kwargs)
            if isinstance(result, Iterator):
                return iter([self.weighed(item) for item in result])
            return self.weighed(result)

        return paid

    def _to_json(
        self,
        x: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON without the escapes for HTML that Jinja's own filter makes, written piece by piece."""
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        if isinstance(indent, int):
            self.charge(indent)
        return "".join([self.weighed(piece) for piece in encoder.iterencode(x)])


class _GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}``, which marks the model's own words for training."""

    tags = {"generation"}  # noqa: RUF012  # as Extension declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """``dict`` of a template, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """``namespace`` of a template, without underscored attributes, which Python itself would read."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that namespace(self=...) works
        self, *given = args
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}")


def _raise(message: Any) -> NoReturn:
    raise TemplateError(str(message))


@pass_context
def _sum(context: Context, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """Jinja's filter ``sum``, each of whose additions is paid for: a sum of lists is quadratic."""
    environment: Any = context.environment
    get = make_attrgetter(environment, attribute) if attribute is not None else lambda item: item
    add = functools.partial(environment.call_binop, context, "+")
    return functools.reduce(add, map(get, iterable), start)


def _size(value: Any, limit: int) -> int:
    """Characters and elements of a value; what is in it twice counts twice, as it does when it is printed."""
    total, stack = 0, [value]
    while stack and total <= limit:
        item = stack.pop()
        total += NODE
        if isinstance(item, (str, bytes)):
            total += len(item)
        elif isinstance(item, int):
            total += item.bit_length() >> 3
        elif isinstance(item, Mapping):
            stack.extend((*item.keys(), *item.values()))
        elif isinstance(item, (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)):
            stack.extend(item)
        elif isinstance(item, Namespace):
            stack.append(object.__getattribute__(item, "_Namespace__attrs"))
    return total


# --- what is paid before a value is made --------------------------------------------------------------------


def _operator_cost(operator: str, left: Any, right: Any) -> int:
    if operator == "%" and isinstance(left, (str, bytes)):
        return _format_cost(left, right)
    if isinstance(left, int) and isinstance(right, int):
        if operator == "**":
            return left.bit_length() * max(right, 0)
        return left.bit_length() * right.bit_length() >> 6 if operator in ("*", "//", "%") else 0
    if operator == "*" and isinstance(left, int):
        left, right = right, left
    if operator == "*" and isinstance(left, Sequence) and isinstance(right, int):
        return (_size(left, LARGEST) if not isinstance(left, (str, bytes)) else len(left)) * max(right, 0)
    return 0


def _format_cost(text: Any, *args: Any, **kwargs: Any) -> int:
    """An upper bound on the length of ``text.format(...)`` and ``text % ...``, widths included."""
    spelled = text.decode("latin-1") if isinstance(text, bytes) else str(text)
    fields = 1 + spelled.count("{") + spelled.count("%")
    if "*" in spelled or re.search(r"\{[^{}]*\{", spelled):  # a width may be one of the arguments
        spelled += f"{args} {kwargs}"
    widths = sum(int(number) for number in re.findall(r"[0-9]+", spelled))
    return fields * (widths + _size((args, kwargs), 2**40))


def _replace_cost(text: Any, old: Any, new: Any, count: Any = None) -> int:
    if not isinstance(text, bytes):
        text, old, new = str(text), str(old), str(new)
    return len(text) + (text.count(old) + 1) * len(new)


def _indent_cost(s: Any, width: Any = 4, first: bool = False, blank: bool = False) -> int:
    return (str(s).count("\n") + 2) * (len(width) if isinstance(width, str) else width)


def _wrap_cost(
    s: Any,
    width: int = 79,
    break_long_words: bool = True,
    wrapstring: str | None = None,
    break_on_hyphens: bool = True,
) -> int:
    length = len(str(s))
    return length * (1 + len(wrapstring or "")) + length**2 // max(width, 1) // 1024


_FREE_FILTERS = frozenset(("attr", "count", "d", "default", "first", "last", "length"))
"""Filters that take the same time whatever they are given, and make nothing."""

_PAID_TESTS = frozenset(
    (
        "==",
        "eq",
        "equalto",
        "!=",
        "ne",
        ">",
        "gt",
        "greaterthan",
        ">=",
        "ge",
        "<",
        "lt",
        "lessthan",
        "<=",
        "le",
    )
) | {"in", "lower", "upper", "divisibleby"}
"""Tests that look into what they are given; the others look at its type."""

_FILTER_COSTS: Mapping[str, Callable[..., int]] = {
    "batch": lambda value, linecount, fill_with=None: NODE * linecount,
    "center": lambda value, width=80: width,
    "format": _format_cost,
    "indent": _indent_cost,
    "join": lambda value, d="", attribute=None: len(str(d)) * length_hint(value, 1),
    "pprint": lambda value: 64 * _size(value, LARGEST),
    "replace": _replace_cost,
    "round": lambda value, precision=0, method="common": NODE * abs(precision),
    "striptags": lambda value: len(str(value)) * str(value).count("<") // 32,
    "urlize": lambda value, *rest, **named: len(str(value)) * _size((rest, named), LARGEST),
    "wordwrap": _wrap_cost,
}
"""Filters that make more than they are given, or take more than linear time; parameters are named as Jinja's."""

_METHOD_COSTS: Mapping[str, Callable[..., int]] = {
    "center": lambda text, width, *fill: width,
    "decode": lambda text, *codec, **named: (
        len(text) ** 2 if codec or named else 0
    ),  # "punycode" is quadratic
    "encode": lambda text, *codec, **named: len(text) ** 2 if codec or named else 0,
    "expandtabs": lambda text, tabsize=8: len(text) * tabsize,
    "format": _format_cost,
    "format_map": _format_cost,
    "join": lambda separator, items: len(separator) * length_hint(items, 1),
    "ljust": lambda text, width, *fill: width,
    "replace": _replace_cost,
    "rjust": lambda text, width, *fill: width,
    "rsplit": lambda text, *rest, **named: len(text) * NODE // 4,
    "split": lambda text, *rest, **named: len(text) * NODE // 4,
    "splitlines": lambda text, *rest, **named: len(text) * NODE // 4,
    "to_bytes": lambda number, length=1, *rest, **named: length,
    "translate": lambda text, table: len(text) * _size(table, LARGEST),
    "zfill": lambda text, width: width,
}
"""Methods of strings, bytes and integers, in the same way."""


# --- what Jinja has no hook for -----------------------------------------------------------------------------


_MADE = (nodes.Concat, nodes.List, nodes.Tuple, nodes.Pair, nodes.Compare, nodes.Operand)
"""Expressions that Python's own operators evaluate: every operand is weighed first."""


def _instrument(template: nodes.Template) -> None:
    """Put the calls into a syntax tree that pay for comparisons, displays, concatenations and repeated bodies."""
    for made in list(template.find_all(_MADE)):
        if getattr(made, "ctx", "load") != "load":  # the targets of an assignment
            continue
        for name, field in list(made.iter_fields()):
            if isinstance(field, list):
                field[:] = [_weighed(item) for item in field]
            else:
                setattr(made, name, _weighed(field))
    for body in list(template.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))):
        text = sum(len(data.data) for data in body.find_all(nodes.TemplateData))
        body.body.insert(0, nodes.ExprStmt(_hook("charge", nodes.Const(NODE + text))).set_lineno(body.lineno))
    for loop in list(template.find_all(nodes.For)):
        loop.iter = _hook("each", loop.iter)


def _weighed(operand: Any) -> Any:
    if not isinstance(operand, nodes.Expr) or isinstance(operand, (nodes.Const, nodes.Slice)):
        return operand
    return _hook("weighed", operand)


def _hook(name: str, argument: Any) -> nodes.Call:
    """A call of a method of the environment."""
    call = nodes.Call(nodes.EnvironmentAttribute(name), [argument], [], None, None)
    call.set_lineno(argument.lineno)
    return call
