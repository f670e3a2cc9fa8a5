"""What a host must know of a language model beside its programs and schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Generation:
    """The facts of a language model.

    ``context`` is the number of positions the model knows, ``vocabulary`` the number of token ids, ``eos`` the
    ids that end a text, ``chat_template`` the Jinja text of a conversation, ``chat_templates`` further ones by name.
    ``special_tokens`` are what these may spell by name (``bos_token``, for example); None where nothing says so, and
    the tokens ``bos`` and ``eos`` are spelled.
    """

    context: int
    vocabulary: int
    eos: tuple[int, ...] = ()
    bos: int | None = None
    chat_template: str | None = None
    chat_templates: Mapping[str, str] = field(default_factory=dict[str, str])
    special_tokens: Mapping[str, str] | None = None
