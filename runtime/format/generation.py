"""What a host must know of a language model beside its programs and schedule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Generation:
    """The facts of a language model.

    ``context`` is the number of positions the model knows, ``vocabulary`` the number of token ids, ``eos`` the
    ids that end a text, ``chat_template`` the Jinja text of a conversation.
    """

    context: int
    vocabulary: int
    eos: tuple[int, ...] = ()
    bos: int | None = None
    chat_template: str | None = None
