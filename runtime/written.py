"""The tokens of a conversation: those that a model wrote stand for its answers, wherever their text is rendered.

A tokenizer often spells an answer otherwise than the model wrote it. The tokens written are as good a spelling of the
same text, and are in the cache already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Protocol


class Encoder(Protocol):
    """What is asked of a :class:`tokopt.runtime.text.Tokenizer`."""

    def encode_parts(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, special: bool = False) -> str: ...
    def parts_at(self, text: str, place: int) -> bool: ...


@dataclass(frozen=True)
class Part:
    """A part of a conversation's text that ends with an answer, and the tokens read and written for it.

    ``messages`` is how many there are up to its end.
    """

    messages: int
    text: str
    tokens: tuple[int, ...]

    def spells(self, tokenizer: Encoder, answer: object) -> bool:
        """Whether its tokens are what a tokenizer makes of its text up to this answer, and a spelling of that."""
        if not isinstance(answer, str) or not self.text.endswith(answer):
            return False
        ids = tokenizer.encode_parts(self.text.removesuffix(answer))
        read, written = list(self.tokens[: len(ids)]), self.tokens[len(ids) :]
        return read == ids and tokenizer.decode(written, special=True) == answer


@dataclass(frozen=True)
class Spelling:
    """A text as tokens: of the parts that it begins with, and of the rest."""

    parts: tuple[Part, ...]
    rest: str
    tokens: tuple[int, ...]

    @cached_property
    def ids(self) -> list[int]:
        """All tokens."""
        return [*chain.from_iterable(part.tokens for part in self.parts), *self.tokens]

    def answered(
        self, tokenizer: Encoder, messages: int, answer: str, written: Sequence[int]
    ) -> tuple[Part, ...]:
        """The parts, and one more if the tokens ``written`` are a spelling of an answer, and of nothing beside.

        They are not where a special token stands among them, or where a stop string has cut the text.
        """
        if tokenizer.decode(written, special=True) != answer:
            return self.parts
        return (*self.parts, Part(messages, self.rest + answer, (*self.tokens, *written)))


def spell(tokenizer: Encoder, text: str, parts: Sequence[Part]) -> Spelling:
    """A text as tokens, in which the tokens of as many parts as it begins with stand for them.

    What follows them has to begin with a special token: there a tokenizer parts any text, so that the rest has the
    same tokens whatever is before it.
    """
    place = end = count = 0
    for number, part in enumerate(parts, 1):
        if not text.startswith(part.text, place):
            break
        place += len(part.text)
        if tokenizer.parts_at(text, place):
            end, count = place, number
    rest = text[end:]
    return Spelling(tuple(parts[:count]), rest, tuple(tokenizer.encode_parts(rest)))
