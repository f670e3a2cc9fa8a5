"""Checks of single arguments: a number, a flag, a path, an object of a class.

Every public function checks what it is given before it does anything. A check returns the value in the type that the
code goes on with, or raises InputError: which argument, what was given, and what it takes.

This module is a leaf, as :mod:`tokopt.errors` is, so that the torch-free runtime shares it.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import reprlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from tokopt.errors import InputError

T = TypeVar("T")

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 60


def described(value: object) -> str:
    """A value and its class, in a few words.

    >>> described("0.5")
    "'0.5' (str)"
    """
    if value is None:
        return "None"
    return f"{' '.join(_SHOWN.repr(value).split())} ({type(value).__name__})"


def wrong(name: str, value: object, takes: str) -> InputError:
    """The error for an argument of the wrong kind."""
    return InputError(f"{name} is {described(value)}, it must be {takes}")


def is_integer(value: object) -> bool:
    """Whether a value counts things: an int, or a NumPy integer; a truth value is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_integer(name: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """An integer within bounds. Scalars and arrays without axes are read, True and False are 1 and 0."""
    takes = "an integer" + _bounds(least, most)
    if getattr(value, "ndim", 0) != 0:  # NumPy and torch take an array of one element for an integer
        raise wrong(name, value, takes)
    try:
        number = operator.index(cast(Any, value))
    except TypeError as error:
        raise wrong(name, value, takes) from error
    if (least is not None and number < least) or (most is not None and number > most):
        raise wrong(name, number, takes)
    return number


def check_number(
    name: str, value: object, holds: Callable[[float], bool] = lambda number: True, range_: str = ""
) -> float:
    """A finite number for which ``holds``, which ``range_`` says in words. Arrays without axes are read."""
    takes = f"a finite number {range_}".rstrip()
    array = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    plain = cast(Any, value).item() if array else value
    if not isinstance(plain, numbers.Real):
        raise wrong(name, value, takes)
    try:
        number = float(plain)
    except OverflowError as error:
        raise wrong(name, value, takes) from error
    if not (math.isfinite(number) and holds(number)):
        raise wrong(name, value, takes)
    return number


def check_flag(name: str, value: object) -> bool:
    """True or False; a word such as ``"no"`` would count as true."""
    if isinstance(value, bool):
        return value
    raise wrong(name, value, "True or False")


def check_text(name: str, value: object) -> str:
    """A str."""
    if isinstance(value, str):
        return value
    raise wrong(name, value, "a str")


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    """One of several words."""
    if isinstance(value, str) and value in choices:
        return value
    raise wrong(name, value, f"one of {', '.join(choices)}")


def check_path(name: str, value: object) -> Path:
    """A path: a str or an ``os.PathLike`` of one, that can be the name of a file."""
    try:
        text = os.fspath(cast(Any, value))
    except TypeError as error:
        raise wrong(name, value, "a path") from error
    if not isinstance(text, str) or not text or "\0" in text:
        raise wrong(name, value, "a path of text without NUL characters")
    return Path(text)


def check_kind(name: str, value: object, kind: type[T] | tuple[type[T], ...], takes: str) -> T:
    """An object of a class, or of one of several; ``takes`` says how to make one."""
    if isinstance(value, kind):
        return value
    raise wrong(name, value, takes)


def check_callable(name: str, value: object, takes: str) -> Callable[..., Any]:
    """A function."""
    if callable(value):
        return value
    raise wrong(name, value, takes)


def check_items(name: str, value: object, takes: str) -> tuple[Any, ...]:
    """The items of a list, a tuple or a set; a text, whose letters are no list, and a mapping are refused."""
    if isinstance(value, Collection) and not isinstance(value, (str, bytes, bytearray, memoryview, Mapping)):
        return tuple(cast("Collection[Any]", value))
    raise wrong(name, value, takes)


def _bounds(least: int | None, most: int | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    return f" of at least {least}" if least is not None else ""
