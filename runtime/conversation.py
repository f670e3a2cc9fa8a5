"""A conversation whose past stays in the cache: every turn reads what is new, and earlier turns can be gone back to."""

# safetensors leaves the types of paths open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Unpack

import numpy as np
import safetensors
import safetensors.numpy

from tokopt.arguments import check_integer, check_path, check_text
from tokopt.errors import InputError
from tokopt.place import writing
from tokopt.runtime.chat import Message
from tokopt.runtime.format.link import Port
from tokopt.runtime.format.manifest import MANIFEST, Manifest
from tokopt.runtime.format.signature import BATCH
from tokopt.runtime.format.state import State
from tokopt.runtime.generate import Generated, Generating, Stream
from tokopt.runtime.loop import Request, Snapshot
from tokopt.runtime.options import Options, TextOptions

KEPT = 2
"""Earlier turns whose cache is kept, to go back to without reading again."""

FORMAT = "1"


@dataclass(frozen=True)
class Going:
    """A request of one row, and how many tokens of the text it has read."""

    request: Request
    read: int


class Talking(Protocol):
    """What is asked of a model, a :class:`tokopt.runtime.language.LanguageModel`."""

    path: Path
    manifest: Manifest

    def chat_prompt(self, messages: Sequence[Message], **variables: Any) -> list[int]: ...
    def open(self, batch: int, slots: int) -> Request: ...
    def continuing(self, ids: Sequence[int], options: Options, going: Going) -> Generating: ...


@dataclass(frozen=True)
class _Place:
    """A cache, and the tokens that it holds."""

    tokens: tuple[int, ...]
    snapshot: Snapshot


class Chat:
    """A conversation with a model, made by :meth:`tokopt.runtime.LanguageModel.chat`.

    >>> chat = model.chat([{"role": "system", "content": "Be brief."}])       # doctest: +SKIP
    >>> chat.say("Name a colour.").text                                     # doctest: +SKIP
    >>> for piece in chat.stream("Another one."):                           # doctest: +SKIP
    ...     print(piece, end="")
    >>> chat.rewind()                                                       # doctest: +SKIP

    An answer is what the model generates for the whole conversation as its chat template renders it. Tokens are read
    once: where the template renders the past as it was read and written, a turn reads the new message alone, and else
    what follows the last turn that it renders so. With a cache that evicts, what was evicted stays so, as in one text.
    """

    def __init__(self, model: Talking, messages: Sequence[Message], variables: Mapping[str, Any]) -> None:
        self.model, self.variables = model, dict(variables)
        self._messages: list[Message] = list(messages)
        self._request: Request | None = None
        self._read: tuple[int, ...] = ()
        self._kept: list[_Place] = []
        self._going: Generating | None = None
        if self._messages:
            self._render(self._messages, answer=False)  # what the template rejects is refused now

    @property
    def messages(self) -> list[Message]:
        """The conversation so far; an answer that is being streamed, or was left early, as far as it was written."""
        going = self._going
        if going is None:
            return list(self._messages)
        return [*self._messages, _answer(going)] if going.texts[0].new else self._messages[:-1]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that the cache holds."""
        self._settle()
        return self._read

    def say(self, content: str, **options: Unpack[TextOptions]) -> Generated:
        """The answer to a message of the user.

        The options are those of :class:`tokopt.runtime.options.TextOptions`, and errors those of
        ``LanguageModel.generate``; ``max_tokens`` is 512 where it is not given. Where it raises InputError, the
        conversation is as it was; so it is where anything else ends it, a KeyboardInterrupt for example.
        """
        going = self._turn(content, Options.of(options, TextOptions, 512))
        try:
            return going.run()[0]
        except BaseException:
            del self._messages[-1]
            self._going = None  # its cache is where a call was left: nothing counts as read
            raise
        finally:
            self._settle()

    def stream(self, content: str, **options: Unpack[TextOptions]) -> Stream[str]:
        """Pieces of the answer as they come, as :meth:`say` otherwise.

        It ends, whoever still reads it, when the chat goes on: with another message, or to be read, rewound or saved.
        """
        going = self._turn(content, Options.of(options, TextOptions, 512))
        return Stream(going, going.texts[0].pieces)

    def read(self) -> None:
        """Read the conversation now, so that the next answer comes sooner: a long system prompt, for example."""
        self._settle()
        if not self._messages:
            raise InputError("there is nothing to read; begin the chat with messages")
        ids = self._render(self._messages, answer=False)
        if tuple(ids) == self._read:
            return
        going = self._place(ids)
        self._read = ()  # until all of it is read
        going.request.prefill([ids[going.read :]], np.zeros(1, np.int64), going.read)
        self._read = tuple(ids)

    def rewind(self, turns: int = 1) -> None:
        """Forget the user's last messages, and all that followed each; raises InputError for more than there are."""
        self._settle()
        places = [at for at, message in enumerate(self._messages) if message.get("role") == "user"]
        turns = check_integer("turns", turns, 0)
        if turns > len(places):
            raise InputError(f"there are {len(places)} turns to go back; rewind by no more")
        if turns:
            del self._messages[places[-turns] :]

    def save(self, path: str | Path) -> None:
        """Write the conversation and its cache to a file, complete or not at all; raises InputError.

        ``LanguageModel.open_chat`` goes on from it, of the same artifact.
        """
        self._settle()
        if self._request is None or not self._read:
            raise InputError("nothing was read yet; say something, or call read, and save then")
        saved = self._request.snapshot()
        ports = list(saved.links)
        arrays = {f"state.{name}": array for name, array in saved.states.items()}
        arrays |= {f"link.{place}": saved.links[port] for place, port in enumerate(ports)}
        arrays |= {f"since.{place}": counts for place, counts in enumerate(saved.since)}
        arrays["tokens"] = np.array(self._read, np.int64)
        about = {
            "format": FORMAT,
            "artifact": _identity(self.model.path),
            "messages": json.dumps(self._messages),
            "links": json.dumps([(port.program, port.name) for port in ports]),
        }
        with writing(check_path("path", path)) as file:
            safetensors.numpy.save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, file, about)

    @classmethod
    def open(cls, model: Talking, path: str | Path, variables: Mapping[str, Any]) -> Chat:
        """The conversation of a file that :meth:`save` wrote."""
        place, messages = _load(model, check_path("path", path))
        chat = cls(model, messages, variables)
        chat._request = model.open(1, len(place.tokens))
        chat._request.restore(place.snapshot)
        chat._read = place.tokens
        return chat

    def __repr__(self) -> str:
        return f"<Chat with {self.model.path.name}: {len(self.messages)} messages, {len(self._read)} tokens read>"

    # --------------------------------------------------------------------------------------------- turns

    def _turn(self, content: str, options: Options) -> Generating:
        """An answer on its way; the conversation holds the message from here on."""
        self._settle()
        messages = [*self._messages, {"role": "user", "content": check_text("content", content)}]
        ids = self._render(messages, answer=True)
        going = self.model.continuing(ids, options, self._place(ids))
        self._messages, self._going, self._read = messages, going, ()
        return going

    def _render(self, messages: Sequence[Message], answer: bool) -> list[int]:
        return self.model.chat_prompt(messages, add_generation_prompt=answer, **self.variables)

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
            self._kept = [*self._kept, _Place(self._read, self._request.snapshot())][-KEPT:]
        return Going(self._request, len(self._read))

    def _settle(self) -> None:
        """Take what the last answer has come to, whether it ended or its stream was left early."""
        going, self._going = self._going, None
        if going is None:
            return
        going.close()
        text = going.texts[0]
        if going.request is None:
            self._read = tuple(text.history[: going.held])
        if not text.new:
            del self._messages[-1]  # it was never begun, or failed while it read
            return
        self._messages = [*self._messages, _answer(going)]
        if not text.cut and not going.calling:  # the last token is read with what follows
            self._read = tuple(text.history[:-1])


def _answer(going: Generating) -> Message:
    """What there is of an answer."""
    return {"role": "assistant", "content": "".join(going.texts[0].pieces)}


def _begins(tokens: tuple[int, ...], ids: Sequence[int]) -> bool:
    """Whether a text goes on after these tokens."""
    return len(tokens) < len(ids) and tuple(ids[: len(tokens)]) == tokens


# --- files ------------------------------------------------------------------------------------------------


def _identity(artifact: Path) -> str:
    return hashlib.sha256((artifact / MANIFEST).read_bytes()).hexdigest()


def _load(model: Talking, path: Path) -> tuple[_Place, list[Message]]:
    """What a file holds, proved to fit the model; raises InputError."""
    try:
        about, arrays = _read(path)
        if about["format"] != FORMAT:
            raise InputError(
                f"{path} is a chat of format {about['format']}, which this version does not know"
            )
        if about["artifact"] != _identity(model.path):
            raise InputError(
                f"{path} is a chat with another artifact than {model.path}; open it with its own"
            )
        ports = [Port(program, name) for program, name in json.loads(about["links"])]
        snapshot = Snapshot(
            {state.name: arrays[f"state.{state.name}"] for state in model.manifest.states},
            {port: arrays[f"link.{place}"] for place, port in enumerate(ports)},
            tuple(arrays[f"since.{i}"] for i in range(sum(name.startswith("since.") for name in arrays))),
        )
        tokens = tuple(arrays["tokens"].tolist())
        messages = json.loads(about["messages"])
    except InputError:
        raise
    except (safetensors.SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no chat that was saved ({type(error).__name__}: {line})") from error
    _check_snapshot(path, model.manifest, snapshot)
    return _Place(tokens, snapshot), messages


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata of a safetensors file, and its arrays."""
    opened: Any = safetensors.safe_open(path, "numpy")
    with opened as file:
        names: list[str] = list(file.keys())
        return file.metadata() or {}, {name: file.get_tensor(name) for name in names}


def _check_snapshot(path: Path, manifest: Manifest, snapshot: Snapshot) -> None:
    """States of the model's types and sizes, none of which says that more slots are used than there are."""
    slots: dict[str, int] = {BATCH: 1}
    for state in manifest.states:
        array = snapshot.states[state.name]
        if str(array.dtype) != state.dtype or array.ndim != len(state.axes) or not _fits(state, array, slots):
            raise _damaged(path, state, f"{array.dtype}{list(array.shape)}")
    lengths = {state.occupancy.state: state for state in manifest.states if state.occupancy is not None}
    for state in manifest.states:
        if state.occupancy is None:
            continue
        used = snapshot.states[state.occupancy.state]
        used = used if state.occupancy.column is None else used[:, state.occupancy.column]
        most = next(slots[axis] for axis in state.axes if isinstance(axis, str) and axis != BATCH)
        if not ((used >= 0) & (used <= most)).all():
            raise _damaged(
                path, lengths[state.occupancy.state], f"for {most} slots {used.tolist()} used ones"
            )
    counting = [trigger for trigger in manifest.schedule.triggers if trigger.after == "tokens"]
    if len(snapshot.since) != len(counting) or any(
        counts.shape != (1,) or counts.dtype != np.int64 for counts in snapshot.since
    ):
        raise InputError(f"{path} is damaged: it counts {len(snapshot.since)} triggers of {len(counting)}")


def _fits(state: State, array: np.ndarray, sizes: dict[str, int]) -> bool:
    """Whether every axis has its size; named ones are noted when they are met first."""
    return all(
        size == (axis if isinstance(axis, int) else sizes.setdefault(axis, size))
        for axis, size in zip(state.axes, array.shape, strict=True)
    )


def _damaged(path: Path, state: State, found: str) -> InputError:
    return InputError(
        f"{path} is damaged: state {state.name!r} of {state.dtype}{list(state.axes)} has {found}"
    )
