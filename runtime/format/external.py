"""The files that an ONNX file refers to, read off its bytes: the weights that an engine would load beside it.

An engine resolves these names itself, so they are held against the manifest before it sees the file: what the manifest
does not list has no hash, and need not lie in the artifact. Only the messages of onnx.proto that can hold a tensor are
walked, in place; weights are skipped.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from tokopt.errors import ArtifactError
from tokopt.runtime.format.entries import ONE_ROW, PORTABLE, Manifest
from tokopt.runtime.format.files import file_fault, file_path
from tokopt.runtime.format.reader import short

Bytes = bytes | mmap.mmap

_MESSAGES: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {
        "model": {7: "graph", 20: "training", 25: "function"},
        "training": {1: "graph", 2: "graph"},
        "function": {7: "node", 11: "attribute"},
        "graph": {1: "node", 5: "tensor", 15: "sparse"},
        "node": {4: "op", 5: "attribute"},
        "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
        "sparse": {1: "tensor", 2: "tensor"},
        "tensor": {13: "entry"},
        "entry": {1: "key", 2: "value"},
    }
)
"""Message -> number of a field -> the message, or the text, in it."""

_NAMES_FILES = ("EPContext",)
"""Ops whose attributes name files."""

_MAX_DEPTH = 64
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}


def check_external(folder: Path, name: str, listed: Mapping[str, object]) -> Path:
    """The path of the ONNX file ``name`` of an artifact, which refers to no file that is not listed.

    Raises ArtifactError for one that does, and for one that is no ONNX file.
    """
    path = file_path(folder, name)
    try:
        with path.open("rb") as stream:
            if not path.stat().st_size:
                raise Malformed("it is empty")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = set(locations(data))
    except (Malformed, OSError) as error:
        raise ArtifactError(f"{path} is no ONNX file ({error}); copy or export the artifact again") from error
    for location in sorted(found):
        beside = (PurePosixPath(name).parent / location).as_posix()
        if beside not in listed:
            raise ArtifactError(
                f"{path} refers to the file {short(location)}, which the manifest does not list; do not use this "
                "artifact"
            )
        file_path(folder, beside)
    return path


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise ArtifactError for the first of :func:`find_faults`."""
    for fault in find_faults(folder, manifest):
        raise ArtifactError(fault)


def find_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the files of an artifact: a size, a hash, or a file that they refer to and is not listed."""
    for name, entry in manifest.files.items():
        fault = file_fault(folder, name, entry)
        if fault is not None:
            yield fault
    for program in manifest.programs.values():
        for form in (PORTABLE, ONE_ROW):
            if form in program.files:
                try:
                    check_external(folder, program.files[form], manifest.files)
                except ArtifactError as error:
                    yield str(error)


class Malformed(Exception):
    """What is wrong with the bytes of a message."""


def locations(data: Bytes) -> Iterator[str]:
    """The names of files in a model, each perhaps several times; raises :class:`Malformed`."""
    todo = [("model", 0, len(data), 0)]
    while todo:
        kind, start, end, depth = todo.pop()
        if depth > _MAX_DEPTH:
            raise Malformed("its graphs lie too deep in each other")
        entry: dict[str, str] = {}
        for field, begin, stop in _fields(data, start, end):
            inner = _MESSAGES[kind].get(field)
            if inner in _MESSAGES:
                todo.append((inner, begin, stop, depth + 1))
            elif inner is not None:
                entry[inner] = data[begin:stop].decode(errors="replace")
        if entry.get("op") in _NAMES_FILES:
            raise Malformed(f"it holds the op {entry['op']}, which names files")
        if entry.get("key") == "location":
            yield entry.get("value", "")


def _fields(data: Bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of every field of a message that holds bytes."""
    while start < end:
        tag, start = _varint(data, start, end)
        wire = tag & 7
        if wire == _VARINT:
            _, start = _varint(data, start, end)
        elif wire == _BYTES:
            size, start = _varint(data, start, end)
            yield tag >> 3, start, start + size
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
