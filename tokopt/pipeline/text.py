"""The one text spelling of a pipeline: ``name{option=value option=value},name``.

The same text is the Python repr, the command line, the log line and the artifact's manifest. The value of an option may
be a pass, ``name{option=name{option=value}}``. What is read here is the form alone: :mod:`tokopt.pipeline.build` looks
the names up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias, cast

from tokopt.errors import PipelineSyntaxError

_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_WORDS = {"true": True, "false": False, "none": None}
_DEEPEST = 8
_LONGEST, _SENTENCE = 200, 900  # characters of a pipeline in an error, and of the error


@dataclass(frozen=True)
class Place:
    """A position in the text of a pipeline, counted from 0."""

    text: str
    at: int

    def error(self, sentence: str) -> PipelineSyntaxError:
        """The error that says ``sentence`` of this place."""
        text = self.text
        if len(text) > _LONGEST:
            text = text[max(self.at - _LONGEST // 2, 0) :][:_LONGEST]
        what = "pipeline" if text is self.text else "in a pipeline"
        return PipelineSyntaxError(f"{what} {text!r}, column {self.at + 1}: {sentence}"[:_SENTENCE])


@dataclass(frozen=True)
class Option:
    """An option as it is written: the place of its name, its value, and the place of that."""

    name_place: Place
    value_place: Place
    value: Value


@dataclass(frozen=True)
class Call:
    """A pass as it is written: its name, its options, and the place of the name."""

    name: str
    options: dict[str, Option]
    place: Place


Value: TypeAlias = "bool | int | float | str | tuple[Value, ...] | Call | None"


def format_value(value: object) -> str:
    """The text of an option's value: ``true``, ``0.5``, ``[1,2]``, ``word``, ``"any text"``, or that of a pass."""
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(format_value, cast("tuple[object, ...]", value))) + "]"
    for word, meaning in _WORDS.items():
        if value is meaning:
            return word
    if isinstance(value, str) and (not _NAME.fullmatch(value) or value in _WORDS):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)


@dataclass
class Reader:
    """A cursor over the text of a pipeline."""

    text: str
    at: int = field(default=0)

    def fail(self, expected: str) -> PipelineSyntaxError:
        found = repr(self.text[self.at]) if self.at < len(self.text) else "the end"
        return self.place().error(
            f"expected {expected}, found {found}; write name{{option=value option=value}},name"
        )

    def place(self) -> Place:
        """Where the next symbol is."""
        self.space()
        return Place(self.text, self.at)

    def space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def take(self, symbol: str) -> bool:
        self.space()
        if self.at < len(self.text) and self.text[self.at] == symbol:
            self.at += 1
            return True
        return False

    def match(self, pattern: re.Pattern[str]) -> str | None:
        self.space()
        if found := pattern.match(self.text, self.at):
            self.at = found.end()
            return found.group()
        return None

    def name(self, what: str) -> str:
        if (name := self.match(_NAME)) is None:
            raise self.fail(what)
        return name

    def calls(self) -> Iterator[Call]:
        """The passes of a pipeline, one by one, to the end of the text."""
        first = True
        while self.place().at < len(self.text):
            if not first and not self.take(","):
                raise self.fail("',' or the end")
            first, place = False, self.place()
            yield Call(self.name("a pass's name"), self.options() if self.take("{") else {}, place)

    def value(self, depth: int = 0) -> Value:
        """The value at the cursor, inside ``depth`` lists and passes that are values themselves."""
        place = self.place()
        if self.take("["):
            return self.items(_deeper(depth, place))
        if self.take('"'):
            return self.quoted()
        if number := self.match(_NUMBER):
            value = float(number)
            if not math.isfinite(value):
                raise self.fail("a number of ordinary size")
            return value if re.search(r"[.eE]", number) else int(number)
        word = self.name("a value")
        if self.take("{"):
            return Call(word, self.options(_deeper(depth, place)), place)
        return _WORDS.get(word, word)

    def items(self, depth: int) -> tuple[Value, ...]:
        items: list[Value] = []
        while not self.take("]"):
            if items and not self.take(","):
                raise self.fail("',' or ']'")
            items.append(self.value(depth))
        return tuple(items)

    def quoted(self) -> str:
        out: list[str] = []
        while self.at < len(self.text):
            char = self.text[self.at]
            self.at += 1
            if char == '"':
                return "".join(out)
            if char == "\\" and self.at < len(self.text):
                char = self.text[self.at]
                self.at += 1
            out.append(char)
        raise self.fail("a closing quote")

    def options(self, depth: int = 0) -> dict[str, Option]:
        options: dict[str, Option] = {}
        while not self.take("}"):
            self.take(",")
            place = self.place()
            name = self.name("an option's name or '}'")
            if name in options:
                raise place.error(f"option {name!r} is given twice; keep one")
            if not self.take("="):
                raise self.fail("'='")
            options[name] = Option(place, self.place(), self.value(depth))
        return options


def _deeper(depth: int, place: Place) -> int:
    """One level more; a text cannot make the reader call itself without end."""
    if depth == _DEEPEST:
        raise place.error(f"more than {_DEEPEST} lists and passes inside each other; write fewer")
    return depth + 1
