"""Strict reading of JSON: every value is checked before it is used, and any fault is an :class:`Invalid`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

Json = object
T = TypeVar("T")

MAX_ITEMS = 100_000
MAX_NAME = 1024
MAX_SIZE = 2**40  # of an axis


class Invalid(Exception):
    """A fault inside a manifest, without the file's name, and its remedy."""

    def __init__(self, fault: str, remedy: str = "export the artifact again") -> None:
        super().__init__(fault)
        self.remedy = remedy


def parse_json(data: bytes) -> Json:
    """The value of a JSON text in UTF-8; raises ValueError or RecursionError."""
    return cast(
        Json, json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    )


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key appears twice in one object")
    return result


def _no_constant(text: str) -> Json:
    raise ValueError(f"{text} is no JSON number")


def read_object(value: Json, where: str, keys: str, optional: str = "") -> dict[str, Json]:
    """A JSON object with exactly these keys, and perhaps the ``optional`` ones."""
    entry, expected = _dict(value, where), keys.split()
    for key in expected:
        if key not in entry:
            raise Invalid(f"{where} lacks the key '{key}'")
    for key in entry:
        if key not in (*expected, *optional.split()):
            raise Invalid(f"{where} has the unknown key {short(key)}")
    return entry


def _dict(value: Json, where: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise Invalid(f"{where} is {short(value)}, it must be an object")
    return cast(dict[str, Json], value)


def read_mapping(value: Json, where: str, read: Callable[[Json, str], T]) -> dict[str, T]:
    """An object from names to values that ``read`` checks."""
    entries = _dict(value, where)
    if len(entries) > MAX_ITEMS:
        raise Invalid(f"{where} has {len(entries)} entries, at most {MAX_ITEMS} are allowed")
    return {read_name(key, where): read(item, f"{where}.{key}") for key, item in entries.items()}


def read_items(value: Json, where: str, read: Callable[[Json, str], T]) -> tuple[T, ...]:
    """A list of values that ``read`` checks."""
    if not isinstance(value, list):
        raise Invalid(f"{where} is {short(value)}, it must be a list")
    items = cast(list[Json], value)
    if len(items) > MAX_ITEMS:
        raise Invalid(f"{where} has {len(items)} items, at most {MAX_ITEMS} are allowed")
    return tuple(read(item, f"{where}[{i}]") for i, item in enumerate(items))


def read_integer(value: Json, where: str, low: int, high: int) -> int:
    """An integer from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Invalid(f"{where} is {short(value)}, it must be an integer from {low} to {high}")
    return value


def read_number(value: Json, where: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise Invalid(f"{where} is {short(value)}, it must be a finite number")
    return float(value)


def read_boolean(value: Json, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise Invalid(f"{where} is {short(value)}, it must be true or false")
    return value


def read_text(value: Json, where: str) -> str:
    """Any string."""
    if not isinstance(value, str):
        raise Invalid(f"{where} is {short(value)}, it must be a string")
    return value


def read_name(value: Json, where: str) -> str:
    """A non-empty printable string; lone surrogates and control characters are not printable."""
    text = read_text(value, where)
    if not text.isprintable() or not 0 < len(text) <= MAX_NAME:
        raise Invalid(
            f"{where} holds {short(text)}, which is no printable name of 1 to {MAX_NAME} characters"
        )
    return text


def read_relative(value: Json, where: str) -> str:
    """A file name that stays inside the artifact on every operating system."""
    text = read_name(value, where)
    if "\\" in text or ":" in text or any(part in ("", ".", "..") for part in text.split("/")):
        raise Invalid(f"{where} is {short(text)}, which does not stay inside the artifact's folder")
    return text


def read_choice(value: Json, where: str, allowed: Sequence[str]) -> str:
    """One of several strings."""
    if not isinstance(value, str) or value not in allowed:
        raise Invalid(f"{where} is {short(value)}, it must be one of {', '.join(allowed)}")
    return value


def read_optional(value: Json, where: str, read: Callable[[Json, str], T]) -> T | None:
    """What ``read`` checks, or null."""
    return None if value is None else read(value, where)


def first_double(names: Iterable[str]) -> str | None:
    """The first name that is there twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _is_finite(number: int | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def short(value: Json) -> str:
    """A value for an error message, in one short line."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = ascii(value) if isinstance(value, str) else json.dumps(value) if value is not None else "null"
    return text if len(text) <= 60 else text[:57] + "..."
