"""What a host must know of a language model beside its programs and schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokopt.arguments import LARGEST, check_integer, check_items, check_kind, check_text


@dataclass(frozen=True)
class Generation:
    """The facts of a language model.

    ``context`` is the number of positions the model knows, ``vocabulary`` the number of token ids, ``eos`` the
    ids that end a text, ``chat_template`` the Jinja text of a conversation, ``chat_templates`` further ones by name.
    ``special_tokens`` are what these may spell by name (``bos_token``, for example); None where nothing says so, and
    the tokens ``bos`` and ``eos`` are spelled.

    Raises InputError for a value of another type.
    """

    context: int
    vocabulary: int
    eos: tuple[int, ...] = ()
    bos: int | None = None
    chat_template: str | None = None
    chat_templates: Mapping[str, str] = field(default_factory=dict[str, str])
    special_tokens: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        check_integer("context", self.context, 1, LARGEST)
        check_integer("vocabulary", self.vocabulary, 1, LARGEST)
        for token in check_items("eos", self.eos, "a tuple of token ids"):
            check_integer("a token of eos", token, 0, LARGEST)
        if self.bos is not None:
            check_integer("bos", self.bos, 0, LARGEST)
        if self.chat_template is not None:
            check_text("chat_template", self.chat_template)
        named = [("chat_templates", self.chat_templates)]
        if self.special_tokens is not None:
            named.append(("special_tokens", self.special_tokens))
        for field_name, texts in named:
            check_kind(field_name, texts, Mapping, "a mapping from names to texts")
            for name, text in texts.items():
                check_text(f"a name in {field_name}", name)
                check_text(f"{field_name}[{name!r}]", text)
