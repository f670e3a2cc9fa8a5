"""A conversation whose past stays in the cache: every turn reads what is new, and earlier turns can be gone back to."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol, Unpack

import numpy as np

from tokopt.arguments import check_integer, check_items, check_kind, check_path, check_text
from tokopt.errors import InputError
from tokopt.runtime.chat import Message
from tokopt.runtime.chat_file import Place, Saved, read_chat, write_chat
from tokopt.runtime.format.manifest import Manifest
from tokopt.runtime.generate import Generated, Generating, Stream, Text
from tokopt.runtime.loop import Request, Snapshot
from tokopt.runtime.options import Options, TextOptions
from tokopt.runtime.reading import Going
from tokopt.runtime.text import Tokenizer
from tokopt.runtime.written import Part, Spelling, spell

CHAT_TOKENS = 512
"""New tokens of an answer where nothing is said."""

KEPT = 2
"""Earlier turns whose cache is kept, to go back to without reading again."""


class Talking(Protocol):
    """What is asked of a model, a :class:`tokopt.runtime.language.LanguageModel`."""

    path: Path
    manifest: Manifest

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def context(self) -> int | None: ...
    def chat_text(self, messages: Sequence[Message], **variables: Any) -> str: ...
    def open(self, batch: int, slots: int) -> Request: ...
    def continuing(
        self, prompts: Sequence[Sequence[int]], options: Options, going: Sequence[Going]
    ) -> Generating: ...


@dataclass(frozen=True)
class _Turn:
    """An answer on its way: a row of a generation, and the text that it answers."""

    generating: Generating
    row: int
    asked: Spelling

    @property
    def text(self) -> Text:
        """What there is of it."""
        return self.generating.texts[self.row]


class Chat:
    """A conversation with a model, made by :meth:`tokopt.runtime.LanguageModel.chat`.

    >>> chat = model.chat([{"role": "system", "content": "Be brief."}])       # doctest: +SKIP
    >>> chat.say("Name a colour.").text                                     # doctest: +SKIP
    >>> for piece in chat.stream("Another one."):                           # doctest: +SKIP
    ...     print(piece, end="")
    >>> chat.rewind()                                                       # doctest: +SKIP

    An answer is what the model generates for the whole conversation as its chat template renders it, in which the
    tokens that the model wrote stand for its answers (:meth:`prompt`). Tokens are read once: where the template renders
    the past as it was read and written, a turn reads the new message alone, and else what follows the last turn that it
    renders so. With a cache that evicts, what was evicted stays so, as in one text. One call at a time may use a chat;
    another raises InputError.
    """

    def __init__(self, model: Talking, messages: Sequence[Message], variables: Mapping[str, Any]) -> None:
        self.model, self.variables = model, dict(variables)
        self._messages: list[Message] = list(messages)
        self._parts: tuple[Part, ...] = ()
        self._request: Request | None = None
        self._read: tuple[int, ...] = ()
        self._kept: list[Place] = []
        self._turn: _Turn | None = None
        self._lock = threading.Lock()
        if self._messages:
            self._spell(self._messages, answer=False)  # what the template rejects is refused now

    @property
    def messages(self) -> list[Message]:
        """The conversation so far; an answer that is being streamed, or was left early, as far as it was written."""
        turn = self._turn
        if turn is None:
            return list(self._messages)
        return [*self._messages, _said(turn)] if turn.text.new else self._messages[:-1]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that the cache holds."""
        with self._using():
            return self._read

    def prompt(self, content: str) -> list[int]:
        """The token ids that the answer to a message of the user follows.

        They are those of ``LanguageModel.chat_prompt``, save that the tokens which the model wrote stand for its
        answers. An answer is spelled anew where the template changes it, where no special token follows it, and where a
        special token is in it or a stop string has cut it.
        """
        with self._using():
            return list(self._asked(content)[1].ids)

    def say(self, content: str, **options: Unpack[TextOptions]) -> Generated:
        """The answer to a message of the user: what ``LanguageModel.generate`` gives for :meth:`prompt`.

        The options are those of :class:`tokopt.runtime.options.TextOptions`, and errors those of
        ``LanguageModel.generate``; ``max_tokens`` is 512 where it is not given. Where it raises InputError, the
        conversation is as it was; so it is where anything else ends it, a KeyboardInterrupt for example.
        """
        return Chat.say_all(self.model, [self], [content], Options.of(options, TextOptions, CHAT_TOKENS))[0]

    def stream(self, content: str, **options: Unpack[TextOptions]) -> Stream[str]:
        """Pieces of the answer as they come, as :meth:`say` otherwise.

        It ends, whoever still reads it, when the chat goes on: with another message, or to be read, rewound or saved.
        """
        told = Options.of(options, TextOptions, CHAT_TOKENS)
        with self._using():
            going = Chat._begin(self.model, [(self, content)], told)
        return Stream(going, going.texts[0].pieces, self._alone)

    @staticmethod
    def say_all(
        model: Talking, chats: Sequence[Chat], contents: Sequence[str], options: Options
    ) -> list[Generated]:
        """The answers of several chats, see ``LanguageModel.say_all``."""
        said = _pairs(model, chats, contents)
        with ExitStack() as held:
            for chat, _ in said:
                held.enter_context(chat._using())
            going = Chat._begin(model, said, options)
            try:
                ended = _run(going)
                for row, snapshot in ended.items():
                    request = said[row][0]._request
                    assert request is not None
                    request.restore(snapshot)
            except BaseException:
                for chat, _ in said:
                    chat._forget()
                raise
            for chat, _ in said:
                chat._settle()
        return [going.generated(row) for row in range(len(said))]

    def read(self) -> None:
        """Read the conversation now, so that the next answer comes sooner: a long system prompt, for example."""
        with self._using():
            if not self._messages:
                raise InputError("there is nothing to read; begin the chat with messages")
            ids = self._fitting(self._spell(self._messages, answer=False)).ids
            if tuple(ids) == self._read:
                return
            going = self._place(ids)
            self._read = ()  # until all of it is read
            going.request.prefill([ids[going.read :]], np.zeros(1, np.int64), going.read)
            self._read = tuple(ids)

    def rewind(self, turns: int = 1) -> None:
        """Forget the user's last messages, and all that followed each; raises InputError for more than there are."""
        with self._using():
            places = [at for at, message in enumerate(self._messages) if message.get("role") == "user"]
            turns = check_integer("turns", turns, 0)
            if turns > len(places):
                raise InputError(f"turns to go back to: {len(places)}; rewind by no more")
            if turns:
                del self._messages[places[-turns] :]
            self._parts = tuple(part for part in self._parts if part.messages <= len(self._messages))

    def save(self, path: str | Path) -> None:
        """Write the conversation and its cache to a file, complete or not at all; raises InputError.

        ``LanguageModel.open_chat`` goes on from it, of the same artifact.
        """
        with self._using():
            if self._request is None or not self._read:
                raise InputError("nothing was read yet; say something, or call read, and save then")
            place = Place(self._read, self._request.snapshot())
            # A caller may have edited what messages gives.
            parts = list(takewhile(self._spelled, self._parts))
            write_chat(check_path("path", path), self.model.path, Saved(place, self._messages, parts))

    @classmethod
    def open(cls, model: Talking, path: str | Path, variables: Mapping[str, Any]) -> Chat:
        """The conversation of a file that :meth:`save` wrote."""
        saved = read_chat(check_path("path", path), model.path, model.manifest)
        chat = cls(model, saved.messages, variables)
        chat._request = model.open(1, len(saved.place.tokens))
        chat._request.restore(saved.place.snapshot)
        if not all(map(chat._spelled, saved.parts)):
            raise InputError(f"{path} is damaged: the tokens of an answer are not those of its text")
        chat._read, chat._parts = saved.place.tokens, tuple(saved.parts)
        return chat

    def __repr__(self) -> str:
        return f"<Chat with {self.model.path.name}: {len(self.messages)} messages, {len(self._read)} tokens read>"

    # --------------------------------------------------------------------------------------------- turns

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Raise InputError where another call uses the chat."""
        if not self._lock.acquire(blocking=False):
            raise InputError(
                "another call is in the middle of this chat; wait for it, or give every thread a chat of its own"
            )
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def _using(self) -> Generator[None]:
        """Have the chat alone, where the last answer has come to its end."""
        with self._alone():
            self._settle()
            yield

    @staticmethod
    def _begin(model: Talking, said: Sequence[tuple[Chat, str]], options: Options) -> Generating:
        """Answers on their way; the conversations hold the messages from here on."""
        asked: list[tuple[list[Message], Spelling]] = []
        for place, (chat, content) in enumerate(said):
            try:
                asked.append(chat._asked(content))
            except InputError as error:
                if len(said) == 1:
                    raise
                raise InputError(f"chat {place}: {error}") from error
        prompts = [spelling.ids for _, spelling in asked]
        places = [chat._place(ids) for (chat, _), ids in zip(said, prompts, strict=True)]
        going = model.continuing(prompts, options, places)
        for row, ((chat, _), (messages, spelling)) in enumerate(zip(said, asked, strict=True)):
            chat._messages, chat._turn, chat._read = messages, _Turn(going, row, spelling), ()
        return going

    def _asked(self, content: str) -> tuple[list[Message], Spelling]:
        """The conversation with a message of the user, and its tokens."""
        messages = [*self._messages, {"role": "user", "content": check_text("content", content)}]
        return messages, self._fitting(self._spell(messages, answer=True))

    def _spell(self, messages: Sequence[Message], answer: bool) -> Spelling:
        """The tokens of the conversation."""
        text = self.model.chat_text(messages, add_generation_prompt=answer, **self.variables)
        return spell(self.model.tokenizer, text, self._parts)

    def _spelled(self, part: Part) -> bool:
        """Whether a part is a spelling of the conversation up to one of its messages."""
        answers = self._messages[part.messages - 1 : part.messages]
        return bool(answers) and part.spells(self.model.tokenizer, answers[0].get("content"))

    def _fitting(self, made: Spelling) -> Spelling:
        """The tokens that the model is to read; raises InputError for more than it takes."""
        most = self.model.context
        if most is not None and len(made.ids) > most:
            raise InputError(
                f"the chat would have {len(made.ids)} tokens and the model's context holds {most}; rewind it, say "
                "less, or begin another chat"
            )
        return made

    def _place(self, ids: Sequence[int]) -> Going:
        """The request, gone back to where it has read nothing but the beginning of a text, and how much of it."""
        if self._request is None:
            self._request, self._read = self.model.open(1, 0), ()
        elif not (self._read and _begins(self._read, ids)):
            found = next((place for place in reversed(self._kept) if _begins(place.tokens, ids)), None)
            if found is None:
                self._request, self._read = self.model.open(1, 0), ()
            else:
                self._request.restore(found.snapshot)
                self._read = found.tokens
        self._kept = [place for place in self._kept if _begins(place.tokens, ids)]
        if self._read and all(place.tokens != self._read for place in self._kept):
            self._kept = [*self._kept, Place(self._read, self._request.snapshot())][-KEPT:]
        return Going(self._request, len(self._read))

    def _settle(self) -> None:
        """Take what the last answer has come to, whether it ended or its stream was left early."""
        turn, self._turn = self._turn, None
        if turn is None:
            return
        turn.generating.close()
        text = turn.text
        if not turn.generating.begun:
            self._read = tuple(text.history[: turn.generating.reading.held[turn.row]])
        if not text.new:
            del self._messages[-1]  # it was never begun, or failed while it read
            return
        self._messages = [*self._messages, _said(turn)]
        written = text.history[text.prompt :]
        if written[-1] in turn.generating.limits.eos:
            del written[-1]
        self._parts = turn.asked.answered(
            self.model.tokenizer, len(self._messages), "".join(text.pieces), written
        )
        if not text.cut and not turn.generating.calling:  # the last token is read with what follows
            self._read = tuple(text.history[:-1])

    def _forget(self) -> None:
        """Have nothing of the last answer, nor of its message; its cache is where a call was left."""
        if self._turn is not None:
            del self._messages[-1]
            self._turn = None


def _run(going: Generating) -> dict[int, Snapshot]:
    """Every text to its end; where several went on together, the cache of each at its own."""
    ended: dict[int, Snapshot] = {}
    for _ in going:
        for row, text in enumerate(going.texts):
            if text.finish and row not in ended and not text.cut and len(going.texts) > 1:
                assert going.request is not None
                ended[row] = going.request.snapshot(row)
    return ended


def _pairs(model: Talking, chats: object, contents: object) -> list[tuple[Chat, str]]:
    """Every chat with what is said in it; raises InputError for chats that cannot take a turn together."""
    takes = "a list of chats of this model"
    pairs = check_items("chats", chats, takes), check_items("contents", contents, "a list of str")
    several = [check_kind("an item of chats", chat, Chat, takes) for chat in pairs[0]]
    if not several or len(several) != len(pairs[1]):
        raise InputError(
            f"there are {len(several)} chats and {len(pairs[1])} messages; give one message for each, and at least one"
        )
    for place, chat in enumerate(several):
        if chat.model is not model:
            raise InputError(
                f"chat {place} is one with {chat.model.path}, not with {model.path}; ask its own model"
            )
        if any(chat is other for other in several[:place]):
            raise InputError(f"chat {place} is there twice; a chat takes one turn at a time")
    return list(zip(several, pairs[1], strict=True))


def _said(turn: _Turn) -> Message:
    """What there is of an answer."""
    return {"role": "assistant", "content": "".join(turn.text.pieces)}


def _begins(tokens: tuple[int, ...], ids: Sequence[int]) -> bool:
    """Whether a text goes on after these tokens."""
    return len(tokens) < len(ids) and tuple(ids[: len(tokens)]) == tokens
