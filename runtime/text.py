"""Text in and out of a language model: tokens, streaming, stop strings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from tokopt.errors import ArtifactError, InputError, MissingDependencyError

MOST_HELD = 16
"""Tokens that are held back at most: no character takes as many, so bytes that go on longer are no text."""

LARGEST_GROWTH = 1024
"""How much longer a tokenizer may make a text by what it replaces; real ones do so a few times at most."""


def read_tokenizer(path: Path) -> str:
    """The text of a ``tokenizer.json``; raises ArtifactError when it is no text or cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is no readable text ({error}); export the artifact again") from error


def read_text(path: str | Path) -> str:
    """A file of text; raises InputError for any other."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no readable text: {error}") from error


class Tokenizer:
    """The tokenizer of an artifact: the text of a ``tokenizer.json``, without its truncation and padding.

    Raises ArtifactError when it cannot be read, is of a larger vocabulary than the model, or makes texts longer
    without bound.
    """

    def __init__(self, text: str, vocabulary: int) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise MissingDependencyError(
                "text needs the package tokenizers; run: pip install 'tokopt[text]', or pass token ids"
            ) from error
        with _faults("be read"):
            self.tokenizer = tokenizers.Tokenizer.from_str(text)
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            size = self.tokenizer.get_vocab_size(
                with_added_tokens=False
            )  # some models lack rows for added ones
            growth = _tokenizer_growth(self.tokenizer)
        if size > vocabulary:
            raise ArtifactError(
                f"the tokenizer has {size} tokens and the model {vocabulary}; export it with its own tokenizer"
            )
        if growth > LARGEST_GROWTH:
            raise ArtifactError(
                f"the tokenizer may make a text {growth} times as long, at most {LARGEST_GROWTH} times is allowed; "
                "export the artifact with another"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer puts around a text."""
        return self._encode(text, special=True)

    def encode_parts(self, text: str) -> list[int]:
        """Token ids of a text that spells its special tokens itself, as a chat template does."""
        return self._encode(text, special=False)

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text is not valid Unicode ({error}); remove its lone surrogates"
            ) from error
        with _faults("encode this text"):
            return self.tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids, without special tokens or with them."""
        with _faults("decode these tokens"):
            return self.tokenizer.decode(list(ids), skip_special_tokens=not special)

    def parts_at(self, text: str, place: int) -> bool:
        """Whether a special token begins there: what follows has the same tokens whatever is before it."""
        return text.startswith(self._special, place)

    @cached_property
    def _special(self) -> tuple[str, ...]:
        """The texts of special tokens that are found in every text, as it is, before anything else."""
        known: dict[int, Any] = self.tokenizer.get_added_tokens_decoder()
        return tuple(
            token.content
            for token in known.values()
            if token.content and token.special and not token.normalized and not token.single_word
        )

    def token(self, index: int) -> str:
        """How the vocabulary spells one token; empty when it has none."""
        return self.tokenizer.id_to_token(index) or ""


class TextStream:
    """Turns the tokens of one text into pieces of text that are ready to be shown.

    A piece is held back while the tokens so far end inside a character, and while they may become one of the
    ``stop`` strings. ``stopped`` is true once a stop string was completed; it is not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.ids: list[int] = []
        self.stopped = False
        self._shown: list[str] = []
        self._pending = ""
        self._prefix = self._read = 0

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._shown)

    def add(self, token: int) -> str:
        """The text that ``token`` makes ready, possibly empty."""
        if self.stopped:
            return ""
        self.ids.append(token)
        return self._show(self._decoded(final=False))

    def finish(self) -> str:
        """What was held back, now that no token follows."""
        if self.stopped:
            return ""
        piece, rest = self._show(self._decoded(final=True)), self._pending
        self._shown.append(rest)
        self._pending = ""
        return piece + rest

    def _decoded(self, final: bool) -> str:
        """The text of the tokens after those read already, unless it ends inside a character.

        A tokenizer may spell a token differently at the start of a text (a leading space), so the tokens read
        last are decoded along and their text is cut off.
        """
        before = self.tokenizer.decode(self.ids[self._prefix : self._read])
        after = self.tokenizer.decode(self.ids[self._prefix :])
        whole = final or not after.endswith("\N{REPLACEMENT CHARACTER}")
        if not whole and len(self.ids) - self._read < MOST_HELD:
            return ""
        self._prefix, self._read = self._read, len(self.ids)
        return after[len(before) :]

    def _show(self, text: str) -> str:
        pending = self._pending + text
        for stop in self.stop:
            if (at := pending.find(stop)) >= 0:
                pending, self.stopped = pending[:at], True
        held = 0 if self.stopped else max((_overlap(pending, stop) for stop in self.stop), default=0)
        ready, self._pending = pending[: len(pending) - held], pending[len(pending) - held :]
        self._shown.append(ready)
        return ready


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def is_library_fault(error: BaseException) -> bool:
    """Whether it is an exception or a panic of Rust, whose class cannot be imported; an interrupt is neither."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def _faults(doing: str) -> Generator[None]:
    """Turn what the library raises on a damaged tokenizer into an ArtifactError: bare exceptions, and Rust's panics."""
    try:
        yield
    except BaseException as error:
        if not is_library_fault(error):
            raise
        line = " ".join(str(error).split())[:300]
        raise ArtifactError(f"the tokenizer cannot {doing} ({line}); export the artifact again") from error


def _tokenizer_growth(tokenizer: Any) -> int:
    """An upper bound on how many times longer the steps of a tokenizer make a text, in encoding or in decoding."""
    encoding = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor)
    steps = [[part for part in side if part is not None] for side in (encoding, (tokenizer.decoder,))]
    return max(math.prod(_growth(json.loads(part.__getstate__())) for part in side) for side in steps)


def _growth(step: Any) -> int:
    """The growth by one step of a tokenizer, as its JSON describes it, and by the steps in it."""
    if isinstance(step, list):
        return math.prod(_growth(item) for item in cast(list[Any], step))
    if not isinstance(step, dict):
        return 1
    parts = cast(dict[str, Any], step)
    match parts:
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if pattern:
            return max(-(-len(content) // len(pattern)), 1)
        case {"type": "Replace", "pattern": {"Regex": str(pattern)}, "content": str(content)}:
            return max(
                len(content) + bool(re.search(r"[*?|^$]|\\[bB]|\{0", pattern)), 1
            )  # it may match nothing
        case {"type": "Replace", "content": str(content)}:
            return 1 + len(content)
        case {"type": "TemplateProcessing", "single": list()}:
            return sum("Sequence" in piece for piece in cast(list[dict[str, Any]], parts["single"]))
        case {"type": "ByteLevel" | "BertNormalizer" | "NFKC" | "NFKD" | "Precompiled"}:
            return 3  # a character may become several
        case _:
            return math.prod(_growth(item) for item in parts.values())
