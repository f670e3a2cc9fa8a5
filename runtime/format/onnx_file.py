"""What an ONNX file says of itself, read off its bytes before an engine sees it.

These are its inputs and outputs, and the files that it refers to, which an engine would resolve by itself. Only the
messages of onnx.proto that can hold either are walked, in place; weights are skipped.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

Bytes = bytes | mmap.mmap

_MESSAGES: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {
        "model": {7: "main", 20: "training", 25: "function"},
        "main": {1: "node", 5: "tensor", 11: "input", 12: "output", 15: "sparse"},
        "training": {1: "graph", 2: "graph"},
        "function": {7: "node", 11: "attribute"},
        "graph": {1: "node", 5: "tensor", 15: "sparse"},
        "node": {5: "attribute"},
        "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
        "sparse": {1: "tensor", 2: "tensor"},
        "tensor": {13: "entry"},
        "input": {2: "type"},
        "output": {2: "type"},
        "type": {1: "array"},
        "array": {2: "shape"},
        "shape": {1: "axis"},
    }
)
"""Message -> number of a field -> the message in it."""

_DTYPES: Mapping[int, str] = MappingProxyType(
    {
        1: "float32",
        2: "uint8",
        3: "int8",
        4: "uint16",
        5: "int16",
        6: "int32",
        7: "int64",
        9: "bool",
        10: "float16",
    }
    | {11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16"}
)

_NAMES_FILES = ("EPContext",)
"""Ops whose attributes name files."""

_MAX_DEPTH = 64
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}


class Malformed(Exception):
    """What is wrong with the bytes of a file."""


@dataclass(frozen=True)
class OnnxValue:
    """An input or output: its numpy dtype (``""`` for none), and per axis its size or its name (``""`` for none)."""

    name: str
    dtype: str
    axes: tuple[int | str, ...] | None


@dataclass(frozen=True)
class OnnxFile:
    """Inputs, outputs, and the names of files that hold weights."""

    inputs: tuple[OnnxValue, ...]
    outputs: tuple[OnnxValue, ...]
    locations: frozenset[str]


@dataclass
class _Message:
    """The fields of a message that are no messages of interest, and those that are, in order."""

    numbers: dict[int, int] = field(default_factory=dict[int, int])
    texts: dict[int, bytes] = field(default_factory=dict[int, bytes])
    inner: list[tuple[str, int, int]] = field(default_factory=list[tuple[str, int, int]])


def read_onnx(data: Bytes) -> OnnxFile:
    """Raises :class:`Malformed` for bytes that are no ONNX model."""
    values: dict[str, list[OnnxValue]] = {"input": [], "output": []}
    locations: set[str] = set()
    todo = [("model", 0, len(data), 0)]
    while todo:
        kind, start, end, depth = todo.pop()
        if depth > _MAX_DEPTH:
            raise Malformed("its graphs lie too deep in each other")
        message = _read(data, kind, start, end)
        if kind in values:
            values[kind].append(_value(data, message))
            continue
        if kind == "entry" and message.texts.get(1) == b"location":
            locations.add(_text(message, 2))
        if kind == "node" and _text(message, 4) in _NAMES_FILES:
            raise Malformed(f"it holds the op {_text(message, 4)}, which names files")
        todo += [(*inner, depth + 1) for inner in message.inner]
    return OnnxFile(tuple(values["input"]), tuple(values["output"]), frozenset(locations))


def _read(data: Bytes, kind: str, start: int, end: int) -> _Message:
    made, known = _Message(), _MESSAGES.get(kind, {})
    for number, value in _fields(data, start, end):
        if isinstance(value, int):
            made.numbers[number] = value
        elif number in known:
            made.inner.append((known[number], *value))
        elif value[1] - value[0] <= _MAX_TEXT:
            made.texts[number] = bytes(data[slice(*value)])
    return made


_MAX_TEXT = 4096


def _text(message: _Message, number: int) -> str:
    return message.texts.get(number, b"").decode(errors="replace")


def _value(data: Bytes, message: _Message) -> OnnxValue:
    """A ValueInfoProto; what is there several times is merged, as protobuf does."""
    arrays = [_read(data, *array) for type_ in message.inner for array in _read(data, *type_).inner]
    dtypes = [array.numbers[1] for array in arrays if 1 in array.numbers]
    shapes = [_read(data, *shape) for array in arrays for shape in array.inner]
    axes = tuple(_axis(_read(data, *axis)) for shape in shapes for axis in shape.inner)
    return OnnxValue(
        _text(message, 1), _DTYPES.get(dtypes[-1], "") if dtypes else "", axes if shapes else None
    )


def _axis(message: _Message) -> int | str:
    return message.numbers[1] if 1 in message.numbers else _text(message, 2)


def _fields(data: Bytes, start: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """The number of every field of a message, and its value, or where its bytes begin and end."""
    while start < end:
        tag, start = _varint(data, start, end)
        wire = tag & 7
        if wire == _VARINT:
            value, start = _varint(data, start, end)
            yield tag >> 3, value
        elif wire == _BYTES:
            size, start = _varint(data, start, end)
            if start + size <= end:
                yield tag >> 3, (start, start + size)
            start += size
        elif wire in _FIXED:
            start += _FIXED[wire]
        else:
            raise Malformed(f"a field has the wire type {wire}")
        if start > end:
            raise Malformed("a field is longer than what it lies in")


def _varint(data: Bytes, start: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if start >= end:
            raise Malformed("a number is cut off")
        byte = data[start]
        start += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, start
    raise Malformed("a number is too long")
