"""Text in and out of a language model: tokens, streaming, stop strings, conversations."""

# jinja2 leaves the globals of an environment untyped.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokopt.errors import ArtifactError, InputError, MissingDependencyError


class Tokenizer:
    """The tokenizer of an artifact: the text of a ``tokenizer.json``.

    Raises ArtifactError when it cannot be read or is of a larger vocabulary than the model.
    """

    def __init__(self, text: str, vocabulary: int) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise MissingDependencyError(
                "text needs the package tokenizers; run: pip install 'tokopt[text]', or pass token ids"
            ) from error
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises a bare Exception
            raise ArtifactError(
                f"the tokenizer cannot be read ({error}); export the artifact again"
            ) from error
        size = self.tokenizer.get_vocab_size(with_added_tokens=False)  # some models lack rows for added ones
        if size > vocabulary:
            raise ArtifactError(
                f"the tokenizer has {size} tokens and the model {vocabulary}; export it with its own tokenizer"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer puts around a text."""
        return self.tokenizer.encode(text).ids

    def encode_parts(self, text: str) -> list[int]:
        """Token ids of a text that spells its special tokens itself, as a chat template does."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

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
        self.shown, self.stopped = "", False
        self._pending = ""
        self._prefix = self._read = 0

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return self.shown

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
        piece = self._show(self._decoded(final=True)) + self._pending
        self.shown, self._pending = self.shown + self._pending, ""
        return piece

    def _decoded(self, final: bool) -> str:
        """The text of the tokens after those read already, unless it ends inside a character.

        A tokenizer may spell a token differently at the start of a text (a leading space), so the tokens read
        last are decoded along and their text is cut off.
        """
        before = self.tokenizer.decode(self.ids[self._prefix : self._read])
        after = self.tokenizer.decode(self.ids[self._prefix :])
        if not final and after.endswith("\N{REPLACEMENT CHARACTER}"):
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
        self.shown += ready
        return ready


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def render_chat(template: str | None, messages: Sequence[Mapping[str, Any]], bos: str, eos: str) -> str:
    """The text of a conversation, ready for the model's answer, by its Jinja template.

    ``messages`` are ``{"role": ..., "content": ...}``. Raises InputError when there is no template or it
    rejects the conversation.
    """
    if template is None:
        raise InputError("this artifact has no chat template; pass the prompt as text")
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingDependencyError("chat templates need jinja2; run: pip install 'tokopt[text]'") from error

    def refuse(message: str) -> None:
        raise InputError(f"the chat template rejects the conversation: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, bos_token=bos, eos_token=eos
        )
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template rejects the conversation: {error}") from error
