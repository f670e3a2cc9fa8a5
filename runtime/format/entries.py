"""What a manifest holds, and the reading of those parts that are the same in every format."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tokopt.runtime.format.files import FileEntry
from tokopt.runtime.format.generation import Generation
from tokopt.runtime.format.link import Link
from tokopt.runtime.format.reader import (
    MAX_SIZE,
    Invalid,
    Json,
    read_choice,
    read_integer,
    read_items,
    read_mapping,
    read_name,
    read_object,
    read_optional,
    read_relative,
    read_text,
    short,
)
from tokopt.runtime.format.schedule import Schedule
from tokopt.runtime.format.signature import DTYPES, Axis, Range, Tensor
from tokopt.runtime.format.state import State

FORMAT_VERSION = 5
"""The newest format that this version reads and the one it writes; any change to the keys raises it.

2: programs may have the key ``engine``. 3: states, links and a schedule say what names and flags said before. 4: the
manifest has a hash of itself. 5: programs may have forms for tokopt's own CPU kernels, with the key ``kernels``.
"""

SEAL = "sha256"
"""The key of the manifest's own hash."""

PORTABLE, ONE_ROW, OWN, ENGINE = "onnx", "onnxruntime", "cpu", "tensorrt"
"""Forms of a program: what any engine reads, what ONNX Runtime's CPU kernels run faster, what calls tokopt's own CPU
kernels, and a TensorRT engine.

The second takes a batch of one and, where the program has an input of role ``mask``, one that is lower-triangular: its
attention lets no new token see a later one. The others take whatever the program takes.
"""

ONNX_FORMS = (PORTABLE, ONE_ROW, OWN)
"""The forms that are ONNX files."""

SEMANTICS = ("exact", "lossless", "approximate")
BUILDERS = ("tensorrt", "tensorrt-rtx", "torch-tensorrt", "torch-tensorrt-rtx")
ARCH = r"sm_[1-9][0-9]{1,2}"

_MAX_RANK = 16
_MAX_FILE_BYTES = 2**46
_MAX_TOKEN = 2**31 - 1


@dataclass(frozen=True)
class Profile:
    """The sizes of an axis that an engine takes, both ends included, and the one it is fastest for."""

    min: int
    opt: int
    max: int

    def __str__(self) -> str:
        """The spelling of ``--profile``: ``1:8:32``, or ``1024`` for a single size."""
        return str(self.min) if self.min == self.max else f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True)
class PluginEntry:
    """A TensorRT plugin that an engine calls: its name and the SHA-256 of its code."""

    name: str
    sha256: str


@dataclass(frozen=True)
class EngineEntry:
    """What executes the engine of a program: no other builder or version, on no other compute capability.

    ``builder`` is ``"tensorrt"`` or ``"tensorrt-rtx"``, or either by way of Torch-TensorRT (``"torch-tensorrt"``,
    ``"torch-tensorrt-rtx"``), ``arch`` a compute capability such as ``"sm_86"``.
    """

    builder: str
    version: str
    arch: str
    profiles: Mapping[str, Profile]
    plugins: tuple[PluginEntry, ...] = ()


@dataclass(frozen=True)
class ProgramEntry:
    """One program: its :class:`.Signature`, and the file of each form it has (``{"onnx": "forward.onnx"}``).

    ``engine`` describes the form ``"tensorrt"``, ``kernels`` is the version of tokopt's CPU kernels that the form
    ``"cpu"`` calls.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    ranges: Mapping[str, Range]
    files: Mapping[str, str]
    engine: EngineEntry | None = None
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    kernels: int | None = None


@dataclass(frozen=True)
class PassEntry:
    """One applied pass: its text, how many sites it changed, its semantics class and its notes."""

    text: str
    matches: int
    semantics: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Everything that ``manifest.json`` says about an artifact."""

    programs: Mapping[str, ProgramEntry]
    files: Mapping[str, FileEntry]
    schedule: Schedule
    states: tuple[State, ...] = ()
    links: tuple[Link, ...] = ()
    generation: Generation | None = None
    semantics: str = "exact"
    pipeline: str = ""
    passes: tuple[PassEntry, ...] = ()
    tokenizer: str | None = None
    selftest: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of ``manifest.json``; :func:`.parse_manifest` is its inverse."""
        content = asdict(self)
        return json.dumps({**content, SEAL: seal(content)}, indent=1, allow_nan=False) + "\n"


def seal(content: Mapping[str, Json]) -> str:
    """The hash of what a manifest says, however it is spaced: SHA-256 of its JSON without the hash, keys sorted."""
    known = {key: value for key, value in content.items() if key != SEAL}
    return hashlib.sha256(json.dumps(known, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_common(top: Mapping[str, Json]) -> dict[str, Any]:
    """What a manifest of any format says beside its programs and how to drive them."""
    return {
        "files": read_mapping(top["files"], "files", _file),
        "semantics": read_choice(top["semantics"], "semantics", SEMANTICS),
        "pipeline": read_text(top["pipeline"], "pipeline"),
        "passes": read_items(top["passes"], "passes", _pass),
        "tokenizer": read_optional(top["tokenizer"], "tokenizer", read_relative),
        "selftest": read_optional(top["selftest"], "selftest", read_relative),
        "versions": read_mapping(top["versions"], "versions", read_text),
    }


def read_engine(value: Json, where: str) -> EngineEntry:
    """What executes an engine."""
    entry = read_object(value, where, "builder version arch profiles plugins")
    return EngineEntry(
        read_choice(entry["builder"], f"{where}.builder", BUILDERS),
        read_name(entry["version"], f"{where}.version"),
        _arch(entry["arch"], f"{where}.arch"),
        read_mapping(entry["profiles"], f"{where}.profiles", _profile),
        read_items(entry["plugins"], f"{where}.plugins", _plugin),
    )


def _arch(value: Json, where: str) -> str:
    text = read_name(value, where)
    if not re.fullmatch(ARCH, text):
        raise Invalid(f"{where} is {short(text)}, it must be a compute capability such as 'sm_86'")
    return text


def _profile(value: Json, where: str) -> Profile:
    entry = read_object(value, where, "min opt max")
    low = read_integer(entry["min"], f"{where}.min", 1, MAX_SIZE)
    usual = read_integer(entry["opt"], f"{where}.opt", low, MAX_SIZE)
    return Profile(low, usual, read_integer(entry["max"], f"{where}.max", usual, MAX_SIZE))


def _plugin(value: Json, where: str) -> PluginEntry:
    entry = read_object(value, where, "name sha256")
    return PluginEntry(
        read_name(entry["name"], f"{where}.name"), read_digest(entry["sha256"], f"{where}.sha256")
    )


def read_generation(entry: Mapping[str, Json], where: str) -> Generation:
    """The facts of a language model; older formats have one chat template and do not name special tokens."""
    return Generation(
        read_integer(entry["context"], f"{where}.context", 1, MAX_SIZE),
        read_integer(entry["vocabulary"], f"{where}.vocabulary", 1, MAX_SIZE),
        read_items(entry["eos"], f"{where}.eos", _token),
        read_optional(entry["bos"], f"{where}.bos", _token),
        read_optional(entry["chat_template"], f"{where}.chat_template", read_text),
        read_mapping(entry.get("chat_templates", {}), f"{where}.chat_templates", read_text),
        read_optional(entry.get("special_tokens"), f"{where}.special_tokens", _tokens),
    )


def _tokens(value: Json, where: str) -> dict[str, str]:
    return read_mapping(value, where, read_text)


def _token(value: Json, where: str) -> int:
    return read_integer(value, where, 0, _MAX_TOKEN)


def _pass(value: Json, where: str) -> PassEntry:
    entry = read_object(value, where, "text matches semantics notes")
    return PassEntry(
        read_text(entry["text"], f"{where}.text"),
        read_integer(entry["matches"], f"{where}.matches", 0, 2**31),
        read_choice(entry["semantics"], f"{where}.semantics", SEMANTICS),
        read_items(entry["notes"], f"{where}.notes", read_text),
    )


def read_range(value: Json, where: str) -> Range:
    """The sizes of an axis."""
    entry = read_object(value, where, "min max")
    low = read_integer(entry["min"], f"{where}.min", 0, MAX_SIZE)
    high = entry["max"]
    return Range(low, None if high is None else read_integer(high, f"{where}.max", low, MAX_SIZE))


def _file(value: Json, where: str) -> FileEntry:
    entry = read_object(value, where, "sha256 size")
    digest = read_digest(entry["sha256"], f"{where}.sha256")
    return FileEntry(digest, read_integer(entry["size"], f"{where}.size", 0, _MAX_FILE_BYTES))


def read_digest(value: Json, where: str) -> str:
    """A SHA-256 in lower-case hexadecimal."""
    digest = read_text(value, where)
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise Invalid(f"{where} is no SHA-256 in lower-case hexadecimal")
    return digest


def read_dtype(value: Json, where: str) -> str:
    """The numpy spelling of a dtype."""
    return read_choice(value, where, sorted(DTYPES))


def read_axes(value: Json, where: str) -> tuple[Axis, ...]:
    """The axes of a tensor."""
    axes = read_items(value, where, read_axis)
    if len(axes) > _MAX_RANK:
        raise Invalid(f"{where} has {len(axes)} axes, at most {_MAX_RANK} are allowed")
    return axes


def read_axis(value: Json, where: str) -> Axis:
    """The name of an axis, or its size."""
    return read_name(value, where) if isinstance(value, str) else read_integer(value, where, 0, MAX_SIZE)
