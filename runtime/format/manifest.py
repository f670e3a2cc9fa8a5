"""The manifest of an artifact: what ``manifest.json`` holds, and its strict reader.

Nothing in a manifest is trusted. Every key, type, name, size and path is checked before it is used, and every
fault is an :class:`ArtifactError` of one sentence: what is wrong, where, and what to do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

from tokopt.errors import ArtifactError
from tokopt.runtime.format.checks import check_format
from tokopt.runtime.format.entries import (
    ARCH,
    ENGINE,
    FORMAT_VERSION,
    ONE_ROW,
    ONNX_FORMS,
    OWN,
    PORTABLE,
    SEAL,
    EngineEntry,
    Manifest,
    PassEntry,
    PluginEntry,
    Profile,
    ProgramEntry,
    read_axes,
    read_axis,
    read_common,
    read_digest,
    read_dtype,
    read_engine,
    read_generation,
    read_range,
    seal,
)
from tokopt.runtime.format.fault import FormatError
from tokopt.runtime.format.files import FileEntry, describe_file, file_fault, file_path
from tokopt.runtime.format.generation import Generation
from tokopt.runtime.format.legacy import read_legacy
from tokopt.runtime.format.link import WHEN, Link, Port
from tokopt.runtime.format.reader import (
    MAX_SIZE,
    Invalid,
    Json,
    parse_json,
    read_boolean,
    read_choice,
    read_integer,
    read_items,
    read_mapping,
    read_name,
    read_number,
    read_object,
    read_optional,
    read_relative,
    read_text,
    short,
)
from tokopt.runtime.format.schedule import AFTER, ENTRY_ROLES, Entry, Schedule, Trigger
from tokopt.runtime.format.signature import INPUT_ROLES, OUTPUT_ROLES, Range, Tensor
from tokopt.runtime.format.state import KINDS, Occupancy, State

__all__ = [
    "ARCH",
    "ENGINE",
    "FORMAT_VERSION",
    "MANIFEST",
    "ONE_ROW",
    "ONNX_FORMS",
    "OWN",
    "PORTABLE",
    "SELFTEST",
    "EngineEntry",
    "FileEntry",
    "Generation",
    "Manifest",
    "PassEntry",
    "PluginEntry",
    "Profile",
    "ProgramEntry",
    "Range",
    "Tensor",
    "describe_file",
    "file_fault",
    "file_path",
    "parse_manifest",
    "read_manifest",
]

MANIFEST = "manifest.json"
SELFTEST = "selftest.safetensors"

OUTLINE = "outline.json"
"""What ``tokopt inspect`` shows of programs that are ``.pt2`` files, so that it need not open those."""

_ROLES = tuple(dict.fromkeys((*INPUT_ROLES, *OUTPUT_ROLES)))

_MAX_MANIFEST_BYTES = 16 * 2**20
_MAX_LAYERS = 100_000
_SEALED = 4  # the first format with a hash of the manifest
_KERNELS = 5  # the first with forms for tokopt's CPU kernels
_MAX_KERNELS = 2**31 - 1


def read_manifest(folder: Path) -> Manifest:
    """Read and validate ``folder/manifest.json``; raises ArtifactError."""
    path = folder / MANIFEST
    try:
        if path.is_symlink():
            raise ArtifactError(
                f"{path} is a symbolic link, which may leave the artifact; copy the file itself"
            )
        if not path.is_file():
            raise ArtifactError(f"{_no_artifact(folder)}; make one with: tokopt export MODEL -o DIR")
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise ArtifactError(
                f"{path} is larger than {_MAX_MANIFEST_BYTES} bytes; export the artifact again"
            )
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); check its permissions") from error
    return parse_manifest(data, str(path))


def _no_artifact(folder: Path) -> str:
    """Why ``folder``, in which there is no manifest, is no artifact."""
    if folder.is_dir():
        return f"{folder} has no {MANIFEST}: it is no tokopt artifact"
    return f"{folder} is not a folder, as artifacts are" if folder.exists() else f"there is no {folder}"


def parse_manifest(data: bytes, where: str = MANIFEST) -> Manifest:
    """Validate the bytes of a manifest; raises ArtifactError and nothing else, whatever ``data`` holds.

    Manifests of older formats are converted to this one.
    """
    try:
        value = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is damaged ({error}); copy or export the artifact again") from error
    try:
        return _manifest(value)
    except Invalid as error:
        raise ArtifactError(f"{where}: {error}; {error.remedy}") from error
    except FormatError as error:
        raise ArtifactError(f"{where}: {error}; export the artifact again") from error


def _manifest(value: Json) -> Manifest:
    if not isinstance(value, dict) or "format_version" not in value:
        raise Invalid("there is no 'format_version', so this is no tokopt manifest")
    version = read_integer(cast(Json, value["format_version"]), "format_version", 1, 2**31)
    if version > FORMAT_VERSION:
        raise Invalid(
            f"format version {version} is newer than {FORMAT_VERSION}, the newest that this tokopt reads",
            "update tokopt",
        )
    manifest = (read_legacy if version < 3 else _current)(cast(Json, value))
    check_format(manifest.programs, manifest.states, manifest.links, manifest.schedule, manifest.generation)
    _check_files(manifest)
    if version >= _SEALED and value[SEAL] != seal(cast(dict[str, Json], value)):
        raise Invalid(
            "it was changed after it was written, since its own sha256 is another",
            "copy or export the artifact again",
        )
    return manifest


def _current(value: Json) -> Manifest:
    keys = "format_version programs files states links schedule generation semantics pipeline passes"
    version = cast(dict[str, int], value)["format_version"]
    sealed = version >= _SEALED
    top = read_object(value, "the manifest", f"{keys} tokenizer selftest versions {SEAL if sealed else ''}")
    if sealed:
        read_digest(top[SEAL], SEAL)
    return Manifest(
        programs=read_mapping(top["programs"], "programs", _program if version >= _KERNELS else _program_4),
        states=read_items(top["states"], "states", _state),
        links=read_items(top["links"], "links", _link),
        schedule=_schedule(top["schedule"], "schedule"),
        generation=read_optional(top["generation"], "generation", _generation),
        **read_common(top),
    )


def _check_files(manifest: Manifest) -> None:
    """Every file that is named is listed, and a program has an engine where it has the file of one."""
    for name in manifest.files:
        read_relative(name, "files")
    used = [("tokenizer", manifest.tokenizer), ("selftest", manifest.selftest)]
    for program, entry in manifest.programs.items():
        where = f"programs.{program}"
        used += [(f"{where}.files", name) for name in entry.files.values()]
        if not entry.files:
            raise Invalid(f"{where} has no files")
        if (entry.engine is None) != (ENGINE not in entry.files):
            raise Invalid(
                f"{where} has {'no engine' if entry.engine is None else 'an engine'}, which its files contradict"
            )
        if (entry.kernels is None) == (OWN in entry.files):
            raise Invalid(
                f"{where} has {'no version' if entry.kernels is None else 'a version'} of tokopt's CPU kernels, which "
                "its files contradict"
            )
        for axis in entry.engine.profiles if entry.engine else ():
            if axis not in entry.ranges:
                raise Invalid(f"{where}.engine.profiles names {short(axis)}, which is no axis of an input")
    for where, name in used:
        if name is not None and name not in manifest.files:
            raise Invalid(f"{where} names {short(name)}, which files does not list")


def _program(value: Json, where: str) -> ProgramEntry:
    entry = dict(read_object(value, where, f"{_PROGRAM_4} kernels"))
    kernels = read_optional(entry.pop("kernels"), f"{where}.kernels", _kernels)
    return replace(_program_4(entry, where), kernels=kernels)


def _kernels(value: Json, where: str) -> int:
    return read_integer(value, where, 1, _MAX_KERNELS)


_PROGRAM_4 = "inputs outputs ranges files engine aliases"


def _program_4(value: Json, where: str) -> ProgramEntry:
    """A program of formats 3 and 4."""
    entry = read_object(value, where, _PROGRAM_4)
    return ProgramEntry(
        read_items(entry["inputs"], f"{where}.inputs", _tensor),
        read_items(entry["outputs"], f"{where}.outputs", _tensor),
        read_mapping(entry["ranges"], f"{where}.ranges", read_range),
        read_mapping(entry["files"], f"{where}.files", read_relative),
        read_optional(entry["engine"], f"{where}.engine", read_engine),
        read_mapping(entry["aliases"], f"{where}.aliases", read_name),
    )


def _tensor(value: Json, where: str) -> Tensor:
    entry = read_object(value, where, "name dtype axes role state")
    return Tensor(
        read_name(entry["name"], f"{where}.name"),
        read_dtype(entry["dtype"], f"{where}.dtype"),
        read_axes(entry["axes"], f"{where}.axes"),
        read_choice(entry["role"], f"{where}.role", _ROLES),
        read_optional(entry["state"], f"{where}.state", read_name),
    )


def _state(value: Json, where: str) -> State:
    entry = read_object(value, where, "name kind dtype axes initial layer occupancy")
    return State(
        read_name(entry["name"], f"{where}.name"),
        read_choice(entry["kind"], f"{where}.kind", KINDS),
        read_dtype(entry["dtype"], f"{where}.dtype"),
        read_axes(entry["axes"], f"{where}.axes"),
        read_number(entry["initial"], f"{where}.initial"),
        read_optional(entry["layer"], f"{where}.layer", _layer),
        read_optional(entry["occupancy"], f"{where}.occupancy", _occupancy),
    )


def _layer(value: Json, where: str) -> int:
    return read_integer(value, where, 0, _MAX_LAYERS)


def _occupancy(value: Json, where: str) -> Occupancy:
    entry = read_object(value, where, "state column")
    column = read_optional(entry["column"], f"{where}.column", _layer)
    return Occupancy(read_name(entry["state"], f"{where}.state"), column)


def _link(value: Json, where: str) -> Link:
    entry = read_object(value, where, "source target when")
    return Link(
        _port(entry["source"], f"{where}.source"),
        _port(entry["target"], f"{where}.target"),
        read_choice(entry["when"], f"{where}.when", WHEN),
    )


def _port(value: Json, where: str) -> Port:
    entry = read_object(value, where, "program name")
    return Port(read_name(entry["program"], f"{where}.program"), read_name(entry["name"], f"{where}.name"))


def _schedule(value: Json, where: str) -> Schedule:
    entry = read_object(value, where, "entries triggers endless", "whole commit")
    return Schedule(
        read_items(entry["entries"], f"{where}.entries", _entry),
        read_items(entry["triggers"], f"{where}.triggers", _trigger),
        read_boolean(entry["endless"], f"{where}.endless"),
        read_optional(entry.get("whole"), f"{where}.whole", read_name),
        read_optional(entry.get("commit"), f"{where}.commit", read_name),
    )


def _entry(value: Json, where: str) -> Entry:
    entry = read_object(value, where, "program role slots", "tree then since depth lossy")
    slots = read_axis(entry["slots"], f"{where}.slots")
    role = read_choice(entry["role"], f"{where}.role", ENTRY_ROLES)
    tree = read_items(entry.get("tree", []), f"{where}.tree", _parent)
    then = read_items(entry.get("then", []), f"{where}.then", read_name)
    since = read_integer(entry.get("since", 0), f"{where}.since", 0, MAX_SIZE)
    depth = read_integer(entry.get("depth", 0), f"{where}.depth", 0, _MAX_LAYERS)
    program = read_name(entry["program"], f"{where}.program")
    lossy = read_text(entry.get("lossy", ""), f"{where}.lossy")
    return Entry(program, role, slots, tree, then, since, depth, lossy)


def _parent(value: Json, where: str) -> int:
    return read_integer(value, where, -1, MAX_SIZE)


def _trigger(value: Json, where: str) -> Trigger:
    entry = read_object(value, where, "program after every prompt")
    return Trigger(
        read_name(entry["program"], f"{where}.program"),
        read_choice(entry["after"], f"{where}.after", AFTER),
        read_integer(entry["every"], f"{where}.every", 0, MAX_SIZE),
        read_boolean(entry["prompt"], f"{where}.prompt"),
    )


def _generation(value: Json, where: str) -> Generation:
    optional = "chat_templates special_tokens"
    entry = read_object(value, where, "context vocabulary eos bos chat_template", optional)
    return read_generation(entry, where)
