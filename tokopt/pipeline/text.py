"""The one text spelling of a pipeline: ``name{option=value option=value},name``.

The same text is the Python repr, the command line, the log line and the artifact's manifest.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from tokopt.errors import PipelineSyntaxError

_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_WORDS = {"true": True, "false": False, "none": None}
_DEEPEST_LIST = 8

Value = None | bool | int | float | str | tuple


def format_value(value: object) -> str:
    """The text of an option's value: ``true``, ``none``, ``0.5``, ``[1,2]``, ``word``, ``"any text"``."""
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(format_value, value)) + "]"
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
        return PipelineSyntaxError(
            f"pipeline {self.text!r}, column {self.at + 1}: expected {expected}, found {found}; "
            "write name{option=value option=value},name"
        )

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

    def value(self, depth: int = 0) -> Value:
        if self.take("["):
            if depth == _DEEPEST_LIST:
                raise self.fail(f"at most {_DEEPEST_LIST} nested lists")
            items: list[Value] = []
            while not self.take("]"):
                if items and not self.take(","):
                    raise self.fail("',' or ']'")
                items.append(self.value(depth + 1))
            return tuple(items)
        if self.take('"'):
            return self.quoted()
        if number := self.match(_NUMBER):
            value = float(number)
            if not math.isfinite(value):
                raise self.fail("a number of ordinary size")
            return value if re.search(r"[.eE]", number) else int(number)
        word = self.name("a value")
        return _WORDS.get(word, word)

    def quoted(self) -> str:
        out = []
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

    def options(self) -> dict[str, Value]:
        options: dict[str, Value] = {}
        while not self.take("}"):
            self.take(",")
            name = self.name("an option's name or '}'")
            if name in options:
                raise PipelineSyntaxError(f"pipeline {self.text!r}: option {name!r} is given twice; keep one")
            if not self.take("="):
                raise self.fail("'='")
            options[name] = self.value()
        return options
