"""Prompts as a caller gives them: text or token ids, one or several; and the strings that end a text."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

import numpy as np

from tokopt.arguments import check_items, is_array, is_integer, wrong
from tokopt.errors import InputError
from tokopt.runtime.inputs import as_array


class ArrayLike(Protocol):
    """What offers itself to NumPy as an array, as tensors of torch do."""

    def __array__(self) -> np.ndarray: ...


Prompt = str | Sequence[int] | ArrayLike
"""Text, or token ids: a list of integers, or an array of them (a tensor of torch, too)."""

_TAKES = "text, or a list of token ids"


def each_prompt(prompts: object) -> tuple[list[Any], bool]:
    """The prompts one by one, and whether a single one was given in place of a list."""
    if isinstance(prompts, str):
        return [prompts], True
    items = _items("prompts", prompts, f"{_TAKES}, or a list of such prompts")
    if not items:
        raise InputError("there is no prompt; give at least one")
    if any(isinstance(item, numbers.Number) for item in items):
        return [prompts], True
    return items, False


def token_ids(name: str, prompt: object, vocabulary: int) -> list[int]:
    """The ids of a prompt that is no text, as integers below ``vocabulary``; raises InputError.

    Neither 5.0 nor True nor "5" is an id: whoever passes them means something else.
    """
    items = _items(name, prompt, _TAKES)
    if set(map(type, items)) == {int} and min(items) >= 0 and max(items) < vocabulary:
        return items
    for place, item in enumerate(items):
        if not is_integer(item):
            raise wrong(f"token {place} of {name}", item, "an integer")
        if not 0 <= item < vocabulary:
            raise InputError(
                f"token id {item} of {name} is outside the vocabulary of {vocabulary} tokens; give one from 0 "
                f"to {vocabulary - 1}"
            )
    return [int(item) for item in items]


def stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """The strings before which a text ends: one alone, several, or none."""
    if stop is None or isinstance(stop, str):
        return (stop,) if stop else ()
    takes = "a str, or a list of them"
    found = check_items("stop", stop, takes)
    for item in found:
        if not isinstance(item, str):
            raise wrong("an item of stop", item, takes)
    return tuple(item for item in found if item)


def _items(name: str, value: object, takes: str) -> list[Any]:
    """The items of a sequence or of an array, whose rows are lists; a text and bytes are no sequence here."""
    if is_array(value):
        array = as_array(name, value, takes)
        if array.ndim and array.dtype.kind in "biufUO":
            return cast("list[Any]", array.tolist())
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview)):
        return list(cast("Sequence[Any]", value))
    raise wrong(name, cast(object, value), takes)
