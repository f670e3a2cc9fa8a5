"""The manifest of an artifact: what ``manifest.json`` holds, and its strict reader.

Nothing in a manifest is trusted. Every key, type, name, size and path is checked before it is used, and every
fault is an :class:`ArtifactError` of one sentence: what is wrong, where, and what to do.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

from tokopt.errors import ArtifactError

FORMAT_VERSION = 2
"""The newest format that this version reads and the one it writes; any change to the keys raises it.

2: programs may have the key ``engine``.
"""

MANIFEST = "manifest.json"
ENGINE = "tensorrt"  # the form of a program that is a TensorRT engine
SELFTEST = "selftest.safetensors"

DTYPES = frozenset(
    ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    + ("float16", "bfloat16", "float32", "float64")
)
SEMANTICS = ("exact", "lossless", "approximate")
TASKS = ("encoder", "causal-lm")
_MAIN = {"encoder": "forward", "causal-lm": "step"}  # the program that every artifact of a task has
BUILDERS = ("tensorrt", "tensorrt-rtx")
ARCH = r"sm_[1-9][0-9]{1,2}"
ROLES = ("input", "tokens", "positions", "mask", "state", "output", "logits", "score")

_MAX_MANIFEST_BYTES = 16 * 2**20
_MAX_ITEMS = 100_000
_MAX_RANK = 16
_MAX_SIZE = 2**40  # of an axis
_MAX_FILE_BYTES = 2**46
_MAX_NAME = 1024

Axis = str | int
Json = object
T = TypeVar("T")


@dataclass(frozen=True)
class Tensor:
    """Name, numpy dtype, axes and role of one input or output.

    An axis is an int (static) or a string (named). Those of inputs are names with a range; those of outputs
    may also be expressions of names, such as ``"tokens - 16"``.
    """

    name: str
    dtype: str
    axes: tuple[Axis, ...]
    role: str = "input"


@dataclass(frozen=True)
class Range:
    """The sizes that a named axis may take, both ends included; ``max`` is None when unbounded."""

    min: int = 1
    max: int | None = None


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

    ``builder`` is ``"tensorrt"`` or ``"tensorrt-rtx"``, ``arch`` a compute capability such as ``"sm_86"``.
    """

    builder: str
    version: str
    arch: str
    profiles: Mapping[str, Profile]
    plugins: tuple[PluginEntry, ...] = ()


@dataclass(frozen=True)
class ProgramEntry:
    """One program: its signature, and the file of each form it has (``{"onnx": "forward.onnx"}``).

    ``engine`` describes the form ``"tensorrt"``.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    ranges: Mapping[str, Range]
    files: Mapping[str, str]
    engine: EngineEntry | None = None


@dataclass(frozen=True)
class StateEntry:
    """A tensor fed back on the next call: program output ``output`` becomes the input ``name``.

    ``in_place``: the main program's output differs from its input only where new entries are written, so one
    buffer may be bound to both; other programs (``compact``) need a second one.
    """

    name: str
    dtype: str
    axes: tuple[Axis, ...]
    output: str
    initial: float = 0.0
    in_place: bool = False


@dataclass(frozen=True)
class Generation:
    """What driving a causal language model takes beside its programs.

    ``context`` is the number of positions the model knows, ``vocabulary`` the number of token ids, ``eos`` the
    ids that end a text, ``chat_template`` the Jinja text of a conversation. ``compact_every`` > 0: run the
    program ``compact`` after the prompt and then after every so many tokens. ``endless``: positions are renumbered
    by ``compact``, so if no more than ``compact_every`` tokens are read in between, a text may outgrow ``context``.
    """

    context: int
    vocabulary: int
    eos: tuple[int, ...] = ()
    bos: int | None = None
    chat_template: str | None = None
    compact_every: int = 0
    endless: bool = False


@dataclass(frozen=True)
class PassEntry:
    """One applied pass: its text, how many sites it changed, its semantics class and its notes."""

    text: str
    matches: int
    semantics: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileEntry:
    """SHA-256 (hexadecimal) and size in bytes of one file of the artifact."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """Everything that ``manifest.json`` says about an artifact."""

    programs: Mapping[str, ProgramEntry]
    files: Mapping[str, FileEntry]
    task: str = "encoder"
    semantics: str = "exact"
    pipeline: str = ""
    passes: tuple[PassEntry, ...] = ()
    states: tuple[StateEntry, ...] = ()
    generation: Generation | None = None
    tokenizer: str | None = None
    selftest: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of ``manifest.json``; :func:`parse_manifest` is its inverse."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and validate ``folder/manifest.json``; raises ArtifactError."""
    path = folder / MANIFEST
    try:
        if not path.is_file():
            what = "has no manifest.json" if folder.is_dir() else "is not a folder"
            raise ArtifactError(f"{folder} {what}: it is no tokopt artifact; make one with tokopt.export")
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise ArtifactError(
                f"{path} is larger than {_MAX_MANIFEST_BYTES} bytes; export the artifact again"
            )
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); check its permissions") from error
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, where: str = MANIFEST) -> Manifest:
    """Validate the bytes of a manifest; raises ArtifactError and nothing else, whatever ``data`` holds."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is damaged ({error}); copy or export the artifact again") from error
    try:
        return _manifest(value)
    except _Invalid as error:
        raise ArtifactError(f"{where}: {error}; {error.remedy}") from error


def file_path(folder: Path, name: str) -> Path:
    """The path of a file of the artifact, proved to stay inside ``folder``; raises ArtifactError.

    Names are relative POSIX paths without ``..``; no component may be a symbolic link.
    """
    try:
        _relative(name, "file name")
    except _Invalid as error:
        raise ArtifactError(f"{folder}: {error}; do not use this artifact") from error
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            raise ArtifactError(
                f"{path} is a symbolic link, which may leave the artifact; copy the file itself"
            )
    if not path.is_file():
        raise ArtifactError(
            f"{path} is missing, though the manifest lists it; copy or export the artifact again"
        )
    return path


def file_fault(folder: Path, name: str, entry: FileEntry) -> str | None:
    """One sentence on what is wrong with a file (missing, size, SHA-256), or None."""
    try:
        path = file_path(folder, name)
        size = path.stat().st_size
        if size != entry.size:
            return (
                f"{path} has {size} bytes, the manifest says {entry.size}; copy or export the artifact again"
            )
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except ArtifactError as error:
        return str(error)
    except OSError as error:
        return f"{folder / name} cannot be read ({error}); copy the artifact again"
    if digest != entry.sha256:
        return f"{path} is damaged: its SHA-256 is not the manifest's; copy or export the artifact again"
    return None


def describe_file(path: Path) -> FileEntry:
    """The entry of an existing file."""
    with path.open("rb") as stream:
        return FileEntry(hashlib.file_digest(stream, "sha256").hexdigest(), path.stat().st_size)


class _Invalid(Exception):
    """A fault inside the manifest, without the file's name, and its remedy."""

    def __init__(self, fault: str, remedy: str = "export the artifact again") -> None:
        super().__init__(fault)
        self.remedy = remedy


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key appears twice in one object")
    return result


def _no_constant(text: str) -> Json:
    raise ValueError(f"{text} is no JSON number")


def _manifest(value: Json) -> Manifest:
    if not isinstance(value, dict) or "format_version" not in value:
        raise _Invalid("there is no 'format_version', so this is no tokopt manifest")
    version = _integer(value["format_version"], "format_version", 1, 2**31)
    if version > FORMAT_VERSION:
        raise _Invalid(
            f"format version {version} is newer than {FORMAT_VERSION}, the newest that this tokopt reads",
            "update tokopt",
        )
    keys = "format_version programs files task semantics pipeline passes states generation"
    top = _object(value, "the manifest", keys + " tokenizer selftest versions")
    manifest = Manifest(
        programs=_mapping(top["programs"], "programs", _program),
        files=_mapping(top["files"], "files", _file),
        task=_choice(top["task"], "task", TASKS),
        semantics=_choice(top["semantics"], "semantics", SEMANTICS),
        pipeline=_text(top["pipeline"], "pipeline"),
        passes=_items(top["passes"], "passes", _pass),
        states=_items(top["states"], "states", _state),
        generation=_optional(top["generation"], "generation", _generation),
        tokenizer=_optional(top["tokenizer"], "tokenizer", _relative),
        selftest=_optional(top["selftest"], "selftest", _relative),
        versions=_mapping(top["versions"], "versions", _text),
        format_version=version,
    )
    _check_links(manifest)
    return manifest


def _check_links(manifest: Manifest) -> None:
    """Names that refer to other entries must refer to something."""
    if not manifest.programs:
        raise _Invalid("programs is empty")
    main = _MAIN[manifest.task]
    if main not in manifest.programs:
        raise _Invalid(f"programs lacks {main!r}, which {manifest.task} artifacts have")
    if (manifest.generation is None) != (manifest.task == "encoder"):
        raise _Invalid(f"generation does not fit the task {manifest.task}")
    for name in manifest.files:
        _relative(name, "files")
    used = [
        (f"programs.{p}.files", f) for p, entry in manifest.programs.items() for f in entry.files.values()
    ]
    used += [("tokenizer", manifest.tokenizer), ("selftest", manifest.selftest)]
    for where, name in used:
        if name is not None and name not in manifest.files:
            raise _Invalid(f"{where} names {_short(name)}, which files does not list")
    inputs = {tensor.name for entry in manifest.programs.values() for tensor in entry.inputs}
    outputs = {tensor.name for entry in manifest.programs.values() for tensor in entry.outputs}
    _distinct([state.name for state in manifest.states], "states")
    for state in manifest.states:
        if state.name not in inputs or state.output not in outputs:
            raise _Invalid(f"state {_short(state.name)} is not wired to an input and an output of a program")


def _program(value: Json, where: str) -> ProgramEntry:
    entry = _object(value, where, "inputs outputs ranges files", optional="engine")
    inputs = _items(entry["inputs"], f"{where}.inputs", _tensor)
    outputs = _items(entry["outputs"], f"{where}.outputs", _tensor)
    ranges = _mapping(entry["ranges"], f"{where}.ranges", _range)
    files = _mapping(entry["files"], f"{where}.files", _relative)
    if not outputs or not files:
        raise _Invalid(f"{where} has no {'files' if outputs else 'outputs'}")
    _distinct([tensor.name for tensor in inputs], f"{where}.inputs")
    _distinct([tensor.name for tensor in outputs], f"{where}.outputs")
    for tensor in inputs:
        for axis in tensor.axes:
            if isinstance(axis, str) and axis not in ranges:
                raise _Invalid(f"{where}.ranges lacks the axis {_short(axis)} of input {_short(tensor.name)}")
    engine = _optional(entry.get("engine"), f"{where}.engine", _engine)
    if (engine is None) != (ENGINE not in files):
        raise _Invalid(
            f"{where} has {'no engine' if engine is None else 'an engine'}, which its files contradict"
        )
    for axis in engine.profiles if engine else ():
        if axis not in ranges:
            raise _Invalid(f"{where}.engine.profiles names {_short(axis)}, which is no axis of an input")
    return ProgramEntry(inputs, outputs, ranges, files, engine)


def _engine(value: Json, where: str) -> EngineEntry:
    entry = _object(value, where, "builder version arch profiles plugins")
    return EngineEntry(
        _choice(entry["builder"], f"{where}.builder", BUILDERS),
        _name(entry["version"], f"{where}.version"),
        _arch(entry["arch"], f"{where}.arch"),
        _mapping(entry["profiles"], f"{where}.profiles", _profile),
        _items(entry["plugins"], f"{where}.plugins", _plugin),
    )


def _arch(value: Json, where: str) -> str:
    text = _name(value, where)
    if not re.fullmatch(ARCH, text):
        raise _Invalid(f"{where} is {_short(text)}, it must be a compute capability such as 'sm_86'")
    return text


def _profile(value: Json, where: str) -> Profile:
    entry = _object(value, where, "min opt max")
    low = _integer(entry["min"], f"{where}.min", 1, _MAX_SIZE)
    usual = _integer(entry["opt"], f"{where}.opt", low, _MAX_SIZE)
    return Profile(low, usual, _integer(entry["max"], f"{where}.max", usual, _MAX_SIZE))


def _plugin(value: Json, where: str) -> PluginEntry:
    entry = _object(value, where, "name sha256")
    return PluginEntry(_name(entry["name"], f"{where}.name"), _digest(entry["sha256"], f"{where}.sha256"))


def _tensor(value: Json, where: str) -> Tensor:
    entry = _object(value, where, "name dtype axes role")
    return Tensor(
        _name(entry["name"], f"{where}.name"),
        _choice(entry["dtype"], f"{where}.dtype", sorted(DTYPES)),
        _axes(entry["axes"], f"{where}.axes"),
        _choice(entry["role"], f"{where}.role", ROLES),
    )


def _state(value: Json, where: str) -> StateEntry:
    entry = _object(value, where, "name dtype axes output initial in_place")
    initial = entry["initial"]
    if isinstance(initial, bool) or not isinstance(initial, (int, float)) or not _is_finite(initial):
        raise _Invalid(f"{where}.initial is {_short(initial)}, it must be a finite number")
    return StateEntry(
        _name(entry["name"], f"{where}.name"),
        _choice(entry["dtype"], f"{where}.dtype", sorted(DTYPES)),
        _axes(entry["axes"], f"{where}.axes"),
        _name(entry["output"], f"{where}.output"),
        float(initial),
        _boolean(entry["in_place"], f"{where}.in_place"),
    )


def _generation(value: Json, where: str) -> Generation:
    entry = _object(value, where, "context vocabulary eos bos chat_template compact_every endless")
    return Generation(
        _integer(entry["context"], f"{where}.context", 1, _MAX_SIZE),
        _integer(entry["vocabulary"], f"{where}.vocabulary", 1, _MAX_SIZE),
        _items(entry["eos"], f"{where}.eos", _token),
        _optional(entry["bos"], f"{where}.bos", _token),
        _optional(entry["chat_template"], f"{where}.chat_template", _text),
        _integer(entry["compact_every"], f"{where}.compact_every", 0, _MAX_SIZE),
        _boolean(entry["endless"], f"{where}.endless"),
    )


def _token(value: Json, where: str) -> int:
    return _integer(value, where, 0, _MAX_SIZE)


def _pass(value: Json, where: str) -> PassEntry:
    entry = _object(value, where, "text matches semantics notes")
    return PassEntry(
        _text(entry["text"], f"{where}.text"),
        _integer(entry["matches"], f"{where}.matches", 0, 2**31),
        _choice(entry["semantics"], f"{where}.semantics", SEMANTICS),
        _items(entry["notes"], f"{where}.notes", _text),
    )


def _range(value: Json, where: str) -> Range:
    entry = _object(value, where, "min max")
    low = _integer(entry["min"], f"{where}.min", 0, _MAX_SIZE)
    high = entry["max"]
    return Range(low, None if high is None else _integer(high, f"{where}.max", low, _MAX_SIZE))


def _file(value: Json, where: str) -> FileEntry:
    entry = _object(value, where, "sha256 size")
    digest = _digest(entry["sha256"], f"{where}.sha256")
    return FileEntry(digest, _integer(entry["size"], f"{where}.size", 0, _MAX_FILE_BYTES))


def _digest(value: Json, where: str) -> str:
    digest = _text(value, where)
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise _Invalid(f"{where} is no SHA-256 in lower-case hexadecimal")
    return digest


def _axes(value: Json, where: str) -> tuple[Axis, ...]:
    axes = _items(value, where, _axis)
    if len(axes) > _MAX_RANK:
        raise _Invalid(f"{where} has {len(axes)} axes, at most {_MAX_RANK} are allowed")
    return axes


def _axis(value: Json, where: str) -> Axis:
    return _name(value, where) if isinstance(value, str) else _integer(value, where, 0, _MAX_SIZE)


def _object(value: Json, where: str, keys: str, optional: str = "") -> dict[str, Json]:
    """A JSON object with exactly these keys, and perhaps the ``optional`` ones."""
    entry, expected = _dict(value, where), keys.split()
    for key in expected:
        if key not in entry:
            raise _Invalid(f"{where} lacks the key '{key}'")
    for key in entry:
        if key not in (*expected, *optional.split()):
            raise _Invalid(f"{where} has the unknown key {_short(key)}")
    return entry


def _dict(value: Json, where: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise _Invalid(f"{where} is {_short(value)}, it must be an object")
    return value


def _mapping(value: Json, where: str, read: Callable[[Json, str], T]) -> dict[str, T]:
    entries = _dict(value, where)
    if len(entries) > _MAX_ITEMS:
        raise _Invalid(f"{where} has {len(entries)} entries, at most {_MAX_ITEMS} are allowed")
    return {_name(key, where): read(item, f"{where}.{key}") for key, item in entries.items()}


def _items(value: Json, where: str, read: Callable[[Json, str], T]) -> tuple[T, ...]:
    if not isinstance(value, list):
        raise _Invalid(f"{where} is {_short(value)}, it must be a list")
    if len(value) > _MAX_ITEMS:
        raise _Invalid(f"{where} has {len(value)} items, at most {_MAX_ITEMS} are allowed")
    return tuple(read(item, f"{where}[{i}]") for i, item in enumerate(value))


def _integer(value: Json, where: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _Invalid(f"{where} is {_short(value)}, it must be an integer from {low} to {high}")
    return value


def _boolean(value: Json, where: str) -> bool:
    if not isinstance(value, bool):
        raise _Invalid(f"{where} is {_short(value)}, it must be true or false")
    return value


def _text(value: Json, where: str) -> str:
    if not isinstance(value, str):
        raise _Invalid(f"{where} is {_short(value)}, it must be a string")
    return value


def _name(value: Json, where: str) -> str:
    """A non-empty printable string; lone surrogates and control characters are not printable."""
    text = _text(value, where)
    if not text.isprintable() or not 0 < len(text) <= _MAX_NAME:
        raise _Invalid(
            f"{where} holds {_short(text)}, which is no printable name of 1 to {_MAX_NAME} characters"
        )
    return text


def _relative(value: Json, where: str) -> str:
    """A file name that stays inside the artifact on every operating system."""
    text = _name(value, where)
    if "\\" in text or ":" in text or any(part in ("", ".", "..") for part in text.split("/")):
        raise _Invalid(f"{where} is {_short(text)}, which does not stay inside the artifact's folder")
    return text


def _choice(value: Json, where: str, allowed: tuple[str, ...] | list[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise _Invalid(f"{where} is {_short(value)}, it must be one of {', '.join(allowed)}")
    return value


def _optional(value: Json, where: str, read: Callable[[Json, str], T]) -> T | None:
    return None if value is None else read(value, where)


def _distinct(names: list[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise _Invalid(f"{where} has the name {_short(name)} twice")
        seen.add(name)


def _is_finite(number: int | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _short(value: Json) -> str:
    """A value for an error message, in one short line."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = ascii(value) if isinstance(value, str) else json.dumps(value) if value is not None else "null"
    return text if len(text) <= 60 else text[:57] + "..."
