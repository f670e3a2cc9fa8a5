"""The manifest: written and read it is the same; any fault of it is an ArtifactError and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.artifacts import Json, document, doubling, sealed, tensor
from tokopt.errors import ArtifactError
from tokopt.runtime.format.manifest import (
    FORMAT_VERSION,
    describe_file,
    file_fault,
    file_path,
    parse_manifest,
)

FILE = MappingProxyType({"sha256": "0" * 64, "size": 3})
SIZES = MappingProxyType({"min": 1, "opt": 2, "max": 8})
FILES = ("forward.onnx", "step.sm_86.engine", "weights/a", "tokenizer.json", "s.safetensors")


ENGINE = MappingProxyType(
    {
        "builder": "tensorrt-rtx",
        "version": "1.7.1",
        "arch": "sm_86",
        "profiles": {"batch": dict(SIZES)},
        "plugins": [{"name": "a", "sha256": "0" * 64}],
    }
)
FACTS = MappingProxyType({"context": 512, "vocabulary": 7, "eos": [1, 2], "bos": 1, "chat_template": None})
TEXTS = MappingProxyType(
    {"chat_templates": {"rag": "{{ bos_token }}"}, "special_tokens": {"bos_token": "<s>"}}
)


def state(name: str, kind: str, dtype: str, *axes: str | int, **more: object) -> Json:
    known = {"name": name, "kind": kind, "dtype": dtype, "axes": list(axes)}
    return {**known, "initial": 0.0, "layer": None, "occupancy": None, **more}


def program(inputs: list[Json], outputs: list[Json], ranges: Json, **more: object) -> Json:
    known = {"inputs": inputs, "outputs": outputs, "ranges": ranges, "files": {"onnx": "forward.onnx"}}
    return {**known, "engine": None, "aliases": {}, "kernels": None, **more}


def good() -> Json:
    """A manifest that uses every key: an encoder whose features a decoder reads, and an eviction."""
    past = state(
        "past", "key", "float32", "batch", "slots", 4, layer=0, occupancy={"state": "used", "column": 1}
    )
    used = state("used", "length", "int64", "batch", 2)
    rows = {"min": 1, "max": None}
    doc = document([], [], {})
    doc |= {
        "states": [past, used],
        "generation": {**FACTS, **TEXTS},
        "files": {name: dict(FILE) for name in FILES},
    }
    cache = tensor("past", "float32", "batch", "slots", 4, role="state", state="past")
    new = tensor("new", "float32", "batch", "slots", 4, role="state", state="past")
    length = [tensor(name, "int64", "batch", 2, role="state", state="used") for name in ("used", "next_used")]
    features = ("features", "float32", "batch", 3)
    doc["programs"] = {
        "see": program(
            [tensor("images", "float32", "batch", 3)], [tensor(*features, role="link")], {"batch": rows}
        ),
        "step": program(
            [
                tensor("ids", "int64", "batch", "tokens", role="tokens"),
                tensor("places", "int64", "batch", "tokens", role="positions"),
                tensor(*features, role="link"),
                cache,
                length[0],
            ],
            [tensor("logits", "float32", "batch", "tokens - 1", 7, role="logits"), new, length[1]],
            {"batch": rows, "tokens": {"min": 1, "max": 512}, "slots": rows},
            aliases={"new": "past"},
            files={"onnx": "forward.onnx", "tensorrt": "step.sm_86.engine"},
            engine=dict(ENGINE),
        ),
        "evict": program([cache, length[0]], [new, length[1]], {"batch": rows, "slots": rows}),
    }
    doc["links"] = [
        {
            "source": {"program": "see", "name": "features"},
            "target": {"program": "step", "name": "features"},
            "when": "call",
        }
    ]
    doc["schedule"] = {
        "entries": [
            {
                "program": "see",
                "role": "encode",
                "slots": 0,
                "tree": [],
                "then": [],
                "since": 0,
                "depth": 2,
                "lossy": "",
            },
            {
                "program": "step",
                "role": "prefill",
                "slots": "tokens",
                "tree": [],
                "then": [],
                "since": 0,
                "depth": 0,
                "lossy": "",
            },
            {
                "program": "step",
                "role": "decode",
                "slots": 1,
                "tree": [],
                "then": [],
                "since": 0,
                "depth": 0,
                "lossy": "",
            },
        ],
        "triggers": [{"program": "evict", "after": "tokens", "every": 8, "prompt": True}],
        "endless": True,
        "whole": None,
        "commit": None,
    }
    return deepcopy(doc | {"tokenizer": "tokenizer.json", "selftest": "s.safetensors"})


def old() -> Json:
    """A manifest of format 2 that uses every key."""

    def described(name: str, dtype: str, *axes: str | int, role: str = "input") -> Json:
        return {"name": name, "dtype": dtype, "axes": list(axes), "role": role}

    step = {
        "inputs": [
            described("tokens", "int64", "batch", "tokens", role="tokens"),
            described("positions", "int64", "batch", "tokens", role="positions"),
            described("past", "float32", "batch", 4, role="state"),
        ],
        "outputs": [
            described("logits", "float32", "batch", "tokens - 1", 7, role="logits"),
            described("new", "float32", "batch", 4, role="state"),
        ],
        "ranges": {"batch": {"min": 1, "max": None}, "tokens": {"min": 1, "max": 512}},
        "files": {"onnx": "forward.onnx", "tensorrt": "step.sm_86.engine"},
        "engine": dict(ENGINE),
    }
    past = {"name": "past", "dtype": "float32", "axes": ["batch", 4], "output": "new", "initial": 0.0}
    doc = {key: value for key, value in good().items() if key not in ("links", "schedule")}
    return deepcopy(
        doc
        | {
            "format_version": 2,
            "task": "causal-lm",
            "programs": {"step": step},
            "states": [past | {"in_place": True}],
            "generation": {**FACTS, "compact_every": 0, "endless": False},
        }
    )


def encode(doc: object) -> bytes:
    """The text of a manifest, with the hash of what it says where it can have one."""
    if isinstance(doc, dict) and doc.get("format_version") == FORMAT_VERSION:
        with suppress(ValueError):  # NaN
            doc = sealed(doc)
    return json.dumps(doc).encode()


def test_written_and_read_back_it_is_the_same() -> None:
    manifest = parse_manifest(encode(good()))
    assert parse_manifest(manifest.to_json().encode()) == manifest
    assert json.loads(manifest.to_json()) == sealed(good())


def test_format_1_knows_no_engines() -> None:
    doc = old()
    doc["format_version"] = 1
    del doc["programs"]["step"]["engine"], doc["programs"]["step"]["files"]["tensorrt"]
    assert parse_manifest(encode(doc)).programs["step"].engine is None


def older(version: int) -> Json:
    """The good manifest in a format without CPU kernels of its own."""
    doc = put("format_version", version)
    for program in doc["programs"].values():
        del program["kernels"]
    return doc


def test_format_4_knows_no_kernels() -> None:
    doc = older(4)
    assert parse_manifest(json.dumps(sealed(doc)).encode()) == parse_manifest(encode(good()))
    put(f"{FORWARD}/kernels", 1, doc)
    with pytest.raises(ArtifactError, match="unknown key 'kernels'"):
        parse_manifest(json.dumps(sealed(doc)).encode())


def test_a_program_says_the_version_of_the_kernels_that_its_form_calls() -> None:
    doc = put(f"{FORWARD}/files/cpu", "forward.onnx")
    assert parse_manifest(encode(put(f"{FORWARD}/kernels", 3, doc))).programs["step"].kernels == 3


def test_format_3_has_no_hash_of_itself() -> None:
    doc = older(3)
    assert parse_manifest(json.dumps(doc).encode()) == parse_manifest(encode(good()))
    with pytest.raises(ArtifactError, match="unknown key 'sha256'"):
        parse_manifest(json.dumps({**doc, "sha256": "0" * 64}).encode())


def test_format_2_becomes_the_newest() -> None:
    manifest = parse_manifest(encode(old()))
    assert manifest.format_version == FORMAT_VERSION
    assert manifest.programs["step"].aliases == {"new": "past"}
    assert [entry.role for entry in manifest.schedule.entries] == ["prefill", "decode"]


def put(path: str, value: object, doc: Json | None = None) -> Json:
    """The good manifest, or another one, with the value at ``path`` (``a/0/b``) replaced."""
    doc = good() if doc is None else doc
    *steps, last = path.split("/")
    place: Any = doc
    for step in steps:
        place = place[int(step) if isinstance(place, list) else step]
    place[int(last) if isinstance(place, list) else last] = value
    return doc


FORWARD = "programs/step"

FAULTS = {
    "newer": (put("format_version", FORMAT_VERSION + 1), "newer than 5.*update tokopt"),
    "version-text": (put("format_version", "1"), "format_version is \"1\"|format_version is '1'"),
    "version-zero": (put("format_version", 0), "format_version is 0"),
    "kernels-of-no-form": (
        put(f"{FORWARD}/kernels", 1),
        "has a version of tokopt's CPU kernels, which its files",
    ),
    "form-of-no-kernels": (
        put(f"{FORWARD}/files/cpu", "forward.onnx"),
        "has no version of tokopt's CPU kernels, which its files contradict",
    ),
    "kernels-as-text": (put(f"{FORWARD}/kernels", "1"), "kernels is \"1\"|kernels is '1'"),
    "kernels-zero": (put(f"{FORWARD}/kernels", 0), "kernels is 0"),
    "unknown-key": (put("extra", 1), "unknown key 'extra'"),
    "no-program": (put("programs", {}), "programs is empty"),
    "programs-list": (put("programs", []), "programs is a list, it must be an object"),
    "no-outputs": (put(f"{FORWARD}/outputs", []), "'step' has no outputs"),
    "no-files": (put(f"{FORWARD}/files", {}), "step has no files"),
    "bad-dtype": (put(f"{FORWARD}/inputs/0/dtype", "float31"), r"inputs\[0\].dtype is 'float31'"),
    "bad-role": (put(f"{FORWARD}/inputs/0/role", []), r"inputs\[0\].role is a list"),
    "bool-axis": (put(f"{FORWARD}/inputs/0/axes", [True]), r"axes\[0\] is true"),
    "negative-axis": (put(f"{FORWARD}/inputs/0/axes", [-1]), r"axes\[0\] is -1"),
    "absurd-axis": (put(f"{FORWARD}/inputs/0/axes", [2**60]), r"axes\[0\] is 1152921504606846976"),
    "absurd-rank": (put(f"{FORWARD}/inputs/0/axes", [1] * 99), "99 axes"),
    "axis-without-range": (
        put("programs/see/inputs/0/axes", ["width"]),
        "lack the axis 'width' of input",
    ),
    "empty-range": (put(f"{FORWARD}/ranges/tokens", {"min": 5, "max": 4}), "ranges.tokens.max is 4"),
    "same-name": (
        put(f"{FORWARD}/inputs/1/name", "ids"),
        "inputs of .* has the name 'ids' twice",
    ),
    "same-output": (
        put(f"{FORWARD}/outputs/1/name", "logits"),
        "outputs of .* has the name 'logits' twice",
    ),
    "unprintable": (put(f"{FORWARD}/inputs/0/name", "a\n"), "no printable name"),
    "surrogate": (put(f"{FORWARD}/inputs/0/name", "\ud800"), "no printable name"),
    "nameless": (put(f"{FORWARD}/inputs/0/name", ""), "no printable name"),
    "unlisted": (put(f"{FORWARD}/files/onnx", "other.onnx"), "'other.onnx', which files does not list"),
    "unlisted-selftest": (put("selftest", "x"), "selftest names 'x'"),
    "no-engine": (put(f"{FORWARD}/engine", None), "step has no engine, which its files contradict"),
    "an-engine": (put(f"{FORWARD}/files", {"onnx": "forward.onnx"}), "an engine, which its files contradict"),
    "arch": (put(f"{FORWARD}/engine/arch", "x86"), "a compute capability such as 'sm_86'"),
    "builder": (put(f"{FORWARD}/engine/builder", "gcc"), "must be one of tensorrt, tensorrt-rtx"),
    "profile-axis": (
        put(f"{FORWARD}/engine/profiles", {"heads": dict(SIZES)}),
        "'heads', which is no axis of an input",
    ),
    "profile-order": (
        put(f"{FORWARD}/engine/profiles/batch/max", 1),
        "max is 1, it must be an integer from 2",
    ),
    "plugin": (put(f"{FORWARD}/engine/plugins/0/sha256", "a"), "plugins.0..sha256 is no SHA-256"),
    "hash": (put("files/forward.onnx/sha256", "F" * 64), "no SHA-256"),
    "absurd-file": (put("files/forward.onnx/size", 2**70), "size is"),
    "unknown-state": (put(f"{FORWARD}/inputs/4/state", "gone"), "names the state 'gone', which is not there"),
    "kind": (put("states/0/kind", "cache"), r"states\[0\].kind is 'cache'"),
    "layer": (put("states/0/layer", -1), r"states\[0\].layer is -1"),
    "column": (put("states/0/occupancy/column", 2), "has the column 2, which state 'used' lacks"),
    "alias": (put(f"{FORWARD}/aliases", {"new": "gone"}), "names 'gone', which is not there"),
    "when": (put("links/0/when", "twice"), r"links\[0\].when is 'twice'"),
    "port": (put("links/0/source/name", "gone"), "'gone' of program 'see', which is not among the outputs"),
    "entry-role": (put("schedule/entries/0/role", "draft"), r"entries\[0\].role is 'draft'"),
    "entry-program": (put("schedule/entries/0/program", "gone"), "'see', which does not run before it"),
    "trigger-program": (
        put("schedule/triggers/0/program", "gone"),
        "runs program 'gone', which is not there",
    ),
    "after": (put("schedule/triggers/0/after", "lunch"), r"triggers\[0\].after is 'lunch'"),
    "every": (put("schedule/triggers/0/every", 0), "every 0 tokens"),
    "infinite-state": (put("states/0/initial", 10**400), "initial is 1000"),
    "semantics": (put("passes/0/semantics", "good"), r"passes\[0\].semantics is 'good'"),
    "notes": (put("passes/0/notes", [1]), r"notes\[0\] is 1"),
    "generation": (put("generation", []), "generation is a list"),
    "no-context": (put("generation/context", 0), "generation.context is 0"),
    "no-generation": (put("generation", None), "it must have one where there is 'generation'"),
    "old-no-generation": (put("generation", None, old()), "generation does not fit the task causal-lm"),
    "old-task": (put("task", "encoder", old()), "programs lacks 'forward'"),
    "old-unwired": (put("states/0/output", "gone", old()), "state 'past' is not wired"),
    "old-key": (put("schedule", {}, old()), "unknown key 'schedule'"),
    "not-an-object": ([], "no tokopt manifest"),
    "version-as-bool": (put("format_version", True), "format_version is true"),
    "foreign": ({"name": "something"}, "no tokopt manifest"),
}


@pytest.mark.parametrize(("doc", "message"), FAULTS.values(), ids=list(FAULTS))
def test_fault_is_named(doc: object, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        parse_manifest(encode(doc))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("make", [good, old])
@pytest.mark.parametrize("key", sorted({*good(), *old()}))
def test_every_key_is_required(key: str, make: Callable[[], Json]) -> None:
    doc = make()
    if doc.pop(key, None) is None and key not in make():
        return
    with pytest.raises(ArtifactError, match=key):
        parse_manifest(encode(doc))


BAD_PATHS = ["/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a\\b", "C:x", "a/", ""]


@pytest.mark.parametrize("name", BAD_PATHS)
def test_path_that_may_leave_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    doc = good()
    doc["files"][name] = dict(FILE)
    with pytest.raises(ArtifactError):
        parse_manifest(encode(doc))
    with pytest.raises(ArtifactError):
        file_path(tmp_path, name)


def test_symbolic_link_is_refused_also_in_the_middle(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("secret")
    folder = tmp_path / "a.tokopt"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "real")
    (folder / "x").symlink_to(tmp_path / "real" / "x")
    for name in ("link/x", "x"):
        with pytest.raises(ArtifactError, match="symbolic link"):
            file_path(folder, name)


def test_file_fault_names_size_hash_and_absence(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    entry = describe_file(path)
    assert file_fault(tmp_path, "x", entry) is None
    path.write_bytes(b"abd")
    assert "SHA-256" in str(file_fault(tmp_path, "x", entry))
    path.write_bytes(b"ab")
    assert "has 2 bytes" in str(file_fault(tmp_path, "x", entry))
    path.unlink()
    assert "missing" in str(file_fault(tmp_path, "x", entry))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b'{"format_version": NaN}',
        b'{"format_version": 1e999}',
        b'{"format_version": 1, "format_version": 1}',
        b"[" * 100_000,
        b'{"format_version": ' + b"9" * 10_000 + b"}",
    ],
)
def test_damaged_json(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        parse_manifest(data)


def test_many_names_are_read_in_linear_time() -> None:
    doc = good()
    doc["programs"]["see"]["inputs"] += [tensor(f"x{i}", "int8") for i in range(50_000)]
    assert len(parse_manifest(encode(doc)).programs["see"].inputs) == 50_001


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def only_artifact_error(data: bytes) -> None:
    try:
        parse_manifest(data)
    except ArtifactError as error:
        assert "\n" not in str(error)


@given(st.binary())
def test_any_bytes(data: bytes) -> None:
    only_artifact_error(data)


@given(json_values)
def test_any_json(value: object) -> None:
    only_artifact_error(encode(value))


@given(st.data())
@settings(max_examples=300)
def test_any_value_anywhere(data: st.DataObject) -> None:
    """One value of a good manifest replaced, wherever it is."""
    doc = data.draw(st.sampled_from([good, old]))()
    place: Any = doc
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(json_values)
    only_artifact_error(encode(doc))


@given(st.integers(min_value=0), st.integers(0, 7), st.booleans())
@settings(max_examples=300)
def test_truncated_and_bit_flipped(position: int, bit: int, cut: bool) -> None:
    data = bytearray(encode(good()))
    position %= len(data)
    if cut:
        del data[position:]
    else:
        data[position] ^= 1 << bit
    only_artifact_error(bytes(data))


@given(st.data())
@settings(max_examples=300)
def test_no_damage_changes_what_it_says(data: st.DataObject) -> None:
    """Some bytes of a written manifest are others, or gone: it is refused, or says the same, spaced differently."""
    text = parse_manifest(encode(good())).to_json().encode()
    start = data.draw(st.integers(0, len(text) - 1))
    end = start + data.draw(st.integers(0, 4))
    put_in = data.draw(st.binary(max_size=4) | st.sampled_from([b"1", b"2", b" ", b"\n", b"true", b"null"]))
    with suppress(ArtifactError):
        assert parse_manifest(text[:start] + put_in + text[end:]) == parse_manifest(text)


def test_a_manifest_that_was_changed_is_refused() -> None:
    """Every single fact of it counts."""
    text = parse_manifest(encode(good())).to_json()
    for old, new in (('"bos": 1', '"bos": 2'), ('"max": 512', '"max": 511'), ('"every": 8', '"every": 9')):
        assert old in text
        with pytest.raises(ArtifactError, match="was changed after it was written"):
            parse_manifest(text.replace(old, new).encode())


def test_manifest_of_a_folder(tmp_path: Path) -> None:
    from tokopt.runtime.format.manifest import read_manifest

    assert read_manifest(doubling(tmp_path / "a.tokopt")).pipeline == "tome{r=16}"
    with pytest.raises(
        ArtifactError, match=r"there is no .*absent; make one with: tokopt export MODEL -o DIR"
    ):
        read_manifest(tmp_path / "absent")
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(ArtifactError, match="is not a folder, as artifacts are; make one"):
        read_manifest(tmp_path / "photo.jpg")
    with pytest.raises(ArtifactError, match="has no manifest"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b" " * (17 * 2**20))
    with pytest.raises(ArtifactError, match="larger than"):
        read_manifest(tmp_path)
