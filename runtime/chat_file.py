"""A conversation and its cache as a file: arrays and JSON, proved to fit the model when it is opened."""

# safetensors leaves the types of paths open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
import safetensors.numpy

from tokopt.arguments import check_integer, check_text
from tokopt.errors import InputError
from tokopt.place import writing
from tokopt.runtime.chat import Message
from tokopt.runtime.format.link import Port
from tokopt.runtime.format.manifest import MANIFEST, Manifest
from tokopt.runtime.format.signature import BATCH
from tokopt.runtime.format.state import State
from tokopt.runtime.loop import Snapshot
from tokopt.runtime.prompts import token_ids
from tokopt.runtime.written import Part

FORMAT = "2"


@dataclass(frozen=True)
class Place:
    """A cache, and the tokens that it holds."""

    tokens: tuple[int, ...]
    snapshot: Snapshot


@dataclass(frozen=True)
class Saved:
    """What a file holds: where the conversation is, its messages, and the tokens of its answers."""

    place: Place
    messages: Sequence[Message]
    parts: Sequence[Part]


def write_chat(path: Path, artifact: Path, chat: Saved) -> None:
    """Write a file, complete or not at all; raises InputError for a path that cannot be written."""
    saved = chat.place.snapshot
    ports = list(saved.links)
    arrays = {f"state.{name}": array for name, array in saved.states.items()}
    arrays |= {f"link.{place}": saved.links[port] for place, port in enumerate(ports)}
    arrays |= {f"since.{place}": counts for place, counts in enumerate(saved.since)}
    arrays["tokens"] = np.array(chat.place.tokens, np.int64)
    about = {
        "format": FORMAT,
        "artifact": _identity(artifact),
        "messages": json.dumps(list(chat.messages)),
        "parts": json.dumps([asdict(part) for part in chat.parts]),
        "links": json.dumps([(port.program, port.name) for port in ports]),
    }
    with writing(path) as file:
        safetensors.numpy.save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, file, about)


def read_chat(path: Path, artifact: Path, manifest: Manifest) -> Saved:
    """What a file holds, proved to fit the model; raises InputError."""
    try:
        about, arrays = _read(path)
        if about["format"] != FORMAT:
            raise InputError(
                f"{path} is a chat of format {about['format']}, which this version does not know"
            )
        if about["artifact"] != _identity(artifact):
            raise InputError(f"{path} is a chat with another artifact than {artifact}; open it with its own")
        ports = [Port(program, name) for program, name in json.loads(about["links"])]
        snapshot = Snapshot(
            {state.name: arrays[f"state.{state.name}"] for state in manifest.states},
            {port: arrays[f"link.{place}"] for place, port in enumerate(ports)},
            tuple(arrays[f"since.{i}"] for i in range(sum(name.startswith("since.") for name in arrays))),
        )
        tokens, messages, parts = arrays["tokens"], json.loads(about["messages"]), about["parts"]
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; a chat is written by chat.save, or by /save") from error
    except (
        safetensors.SafetensorError,
        OSError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no chat that was saved ({type(error).__name__}: {line})") from error
    _check_snapshot(path, manifest, snapshot)
    if tokens.ndim != 1 or tokens.dtype != np.int64:
        raise InputError(f"{path} is damaged: its tokens are {tokens.dtype}{list(tokens.shape)}")
    if not (
        isinstance(messages, list) and all(isinstance(one, dict) for one in cast(list[object], messages))
    ):
        raise InputError(f"{path} is damaged: its messages are no list of them")
    place = Place(tuple(tokens.tolist()), snapshot)
    return Saved(place, cast(list[Message], messages), _parts(path, manifest, parts))


def _parts(path: Path, manifest: Manifest, text: str) -> list[Part]:
    """The parts of the conversation's text, with tokens that the model has."""
    assert manifest.generation is not None
    vocabulary = manifest.generation.vocabulary

    def part(messages: object, text: object, tokens: object) -> Part:
        ids = token_ids("a part", tokens, vocabulary)
        return Part(check_integer("messages", messages, 0), check_text("text", text), tuple(ids))

    try:
        return [part(**given) for given in json.loads(text)]
    except (RecursionError, TypeError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is damaged: its answers have no tokens ({line})") from error


def _identity(artifact: Path) -> str:
    return hashlib.sha256((artifact / MANIFEST).read_bytes()).hexdigest()


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
    if not set(snapshot.links) <= {link.target for link in manifest.links}:
        raise InputError(f"{path} is damaged: it has values of links that the model does not have")
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
