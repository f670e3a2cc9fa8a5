"""Checks of single arguments: a number, a flag, a path, an object of a class.

Every public function checks what it is given before it does anything. A check returns the value in the type that the
code goes on with, or raises InputError: which argument, what was given, and what it takes.

This module is a leaf, as :mod:`tokopt.errors` is, so that the torch-free runtime shares it.
"""

from __future__ import annotations

import math
import numbers
import os
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from tokopt.errors import InputError

T = TypeVar("T")

LARGEST = 2**40
"""The largest size, as in a manifest."""

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 60


def described(value: object) -> str:
    """A value and its class, in a few words.

    >>> described("0.5")
    "'0.5' (str)"
    """
    kind = type(value).__name__
    if value is None:
        return "None"
    try:
        return f"{' '.join(_SHOWN.repr(value).split())} ({kind})"
    except ValueError:  # an integer of thousands of digits
        return f"a large {kind}"


def wrong(name: str, value: object, takes: str) -> InputError:
    """The error for an argument of the wrong kind."""
    return InputError(f"{name} is {described(value)}, it must be {takes}")


def is_array(value: object) -> bool:
    """Whether a value offers itself to NumPy as an array, as tensors of torch do; asked of its class alone."""
    return hasattr(type(value), "__array__")


def is_integer(value: object) -> bool:
    """Whether a value counts things: an int, or a NumPy integer; neither a truth value nor a duration is one."""
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.timedelta64))


def check_integer(name: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """An integer within bounds. Arrays without axes are read, True and False are 1 and 0."""
    plain = _plain(value)
    if not isinstance(plain, numbers.Integral):
        raise wrong(name, value, "an integer" + _bounds(least, most))
    number = int(plain)
    if (least is not None and number < least) or (most is not None and number > most):
        raise wrong(name, number, "an integer" + _bounds(least, most))
    return number


def check_number(
    name: str, value: object, holds: Callable[[float], bool] = lambda number: True, range_: str = ""
) -> float:
    """A finite number for which ``holds``, which ``range_`` says in words. Arrays without axes are read."""
    takes = f"a finite number {range_}".rstrip()
    plain = _plain(value)
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
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
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
    if not isinstance(text, str) or not text:
        raise wrong(name, value, "a path of text")
    try:
        os.lstat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long, forbidden, or with characters that no name has
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{name} is {described(value)}, where no file can be looked for ({reason}); choose another path"
        ) from error
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


def check_iterable(name: str, value: object, takes: str) -> Iterable[Any]:
    """What gives items one by one, once or several times; neither a text, nor bytes, nor a mapping, which has names."""
    alone = isinstance(value, (str, bytes, bytearray, Mapping)) or (
        is_array(value) and getattr(value, "ndim", 0) == 0
    )
    if alone or not isinstance(value, Iterable):
        raise wrong(name, value, takes)
    return cast("Iterable[Any]", value)


def check_items(name: str, value: object, takes: str) -> tuple[Any, ...]:
    """The items of a list, a tuple or a set; a text, whose letters are no list, and a mapping are refused."""
    letters = isinstance(value, (str, bytes, bytearray, memoryview))
    if letters or isinstance(value, Mapping) or not isinstance(value, Collection):
        raise wrong(name, value, takes)
    try:
        return tuple(cast("Collection[Any]", value))
    except TypeError as error:  # an array without axes calls itself a collection
        raise wrong(name, value, takes) from error


def _plain(value: object) -> object:
    """The element of an array without axes, as Python's own; every other value as it is."""
    if isinstance(value, np.timedelta64):  # NumPy counts a duration among the integers
        return None
    if not is_array(value) or getattr(value, "ndim", None) != 0:
        return value
    try:
        return cast(Any, value).item()
    except Exception:  # a tensor without data
        return value


def _bounds(least: int | None, most: int | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    return f" of at least {least}" if least is not None else ""
