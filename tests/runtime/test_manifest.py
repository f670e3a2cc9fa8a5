"""The manifest: written and read it is the same; any fault of it is an ArtifactError and nothing else."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.artifacts import Json, document, doubling, tensor
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


def good() -> Json:
    """A manifest that uses every key."""
    doc = document(
        [tensor("ids", "int64", "batch", "tokens", role="tokens"), tensor("past", "float32", "batch", 4)],
        [
            tensor("logits", "float32", "batch", "tokens - 1", 7, role="logits"),
            tensor("new", "float32", "batch", 4),
        ],
        {"batch": {"min": 1, "max": None}, "tokens": {"min": 2, "max": 512}},
        files={name: dict(FILE) for name in FILES},
        task="causal-lm",
        states=[
            {
                "name": "past",
                "dtype": "float32",
                "axes": ["batch", 4],
                "output": "new",
                "initial": 0.0,
                "in_place": True,
            }
        ],
        generation={
            "context": 512,
            "vocabulary": 7,
            "eos": [1, 2],
            "bos": 1,
            "chat_template": None,
            "compact_every": 0,
            "endless": False,
        },
        tokenizer="tokenizer.json",
        selftest="s.safetensors",
        format_version=FORMAT_VERSION,
    )
    step = doc["programs"]["step"] = doc["programs"].pop("forward")
    step["files"]["tensorrt"] = "step.sm_86.engine"
    step["engine"] = {
        "builder": "tensorrt-rtx",
        "version": "1.7.1",
        "arch": "sm_86",
        "profiles": {"batch": dict(SIZES)},
        "plugins": [{"name": "a", "sha256": "0" * 64}],
    }
    return doc


def encode(doc: object) -> bytes:
    return json.dumps(doc).encode()


def test_written_and_read_back_it_is_the_same() -> None:
    manifest = parse_manifest(encode(good()))
    assert parse_manifest(manifest.to_json().encode()) == manifest
    assert json.loads(manifest.to_json()) == good()


def test_format_1_knows_no_engines() -> None:
    doc = good()
    doc["format_version"] = 1
    del doc["programs"]["step"]["engine"], doc["programs"]["step"]["files"]["tensorrt"]
    assert parse_manifest(encode(doc)).programs["step"].engine is None


def put(path: str, value: object) -> Json:
    """The good manifest with the value at ``path`` (``a.0.b``) replaced."""
    doc = good()
    *steps, last = path.split("/")
    place: Any = doc
    for step in steps:
        place = place[int(step) if isinstance(place, list) else step]
    place[int(last) if isinstance(place, list) else last] = value
    return doc


FORWARD = "programs/step"

FAULTS = {
    "newer": (put("format_version", FORMAT_VERSION + 1), "newer than 2.*update tokopt"),
    "version-text": (put("format_version", "1"), "format_version is \"1\"|format_version is '1'"),
    "version-zero": (put("format_version", 0), "format_version is 0"),
    "unknown-key": (put("extra", 1), "unknown key 'extra'"),
    "no-program": (put("programs", {}), "programs is empty"),
    "programs-list": (put("programs", []), "programs is a list, it must be an object"),
    "no-outputs": (put(f"{FORWARD}/outputs", []), "step has no outputs"),
    "no-files": (put(f"{FORWARD}/files", {}), "step has no files"),
    "bad-dtype": (put(f"{FORWARD}/inputs/0/dtype", "float31"), r"inputs\[0\].dtype is 'float31'"),
    "bad-role": (put(f"{FORWARD}/inputs/0/role", []), r"inputs\[0\].role is a list"),
    "bool-axis": (put(f"{FORWARD}/inputs/0/axes", [True]), r"axes\[0\] is true"),
    "negative-axis": (put(f"{FORWARD}/inputs/0/axes", [-1]), r"axes\[0\] is -1"),
    "absurd-axis": (put(f"{FORWARD}/inputs/0/axes", [2**60]), r"axes\[0\] is 1152921504606846976"),
    "absurd-rank": (put(f"{FORWARD}/inputs/0/axes", [1] * 99), "99 axes"),
    "axis-without-range": (
        put(f"{FORWARD}/inputs/0/axes", ["width"]),
        "lacks the axis 'width' of input 'ids'",
    ),
    "empty-range": (put(f"{FORWARD}/ranges/tokens", {"min": 5, "max": 4}), "ranges.tokens.max is 4"),
    "same-name": (put(f"{FORWARD}/inputs/1/name", "ids"), "inputs has the name 'ids' twice"),
    "same-output": (put(f"{FORWARD}/outputs/1/name", "logits"), "outputs has the name 'logits' twice"),
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
    "unwired-state": (put("states/0/output", "gone"), "state 'past' is not wired"),
    "infinite-state": (put("states/0/initial", 10**400), "initial is 1000"),
    "semantics": (put("passes/0/semantics", "good"), r"passes\[0\].semantics is 'good'"),
    "notes": (put("passes/0/notes", [1]), r"notes\[0\] is 1"),
    "generation": (put("generation", []), "generation is a list"),
    "no-context": (put("generation/context", 0), "generation.context is 0"),
    "no-generation": (put("generation", None), "generation does not fit the task causal-lm"),
    "another-task": (put("task", "encoder"), "programs lacks 'forward'"),
    "not-an-object": ([], "no tokopt manifest"),
    "foreign": ({"name": "something"}, "no tokopt manifest"),
}


@pytest.mark.parametrize(("doc", "message"), FAULTS.values(), ids=list(FAULTS))
def test_fault_is_named(doc: object, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        parse_manifest(encode(doc))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("key", sorted(good()))
def test_every_key_is_required(key: str) -> None:
    doc = good()
    del doc[key]
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
    doc["programs"]["step"]["inputs"] += [tensor(f"x{i}", "int8") for i in range(50_000)]
    assert len(parse_manifest(encode(doc)).programs["step"].inputs) == 50_002


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
    doc = deepcopy(good())
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


def test_manifest_of_a_folder(tmp_path: Path) -> None:
    from tokopt.runtime.format.manifest import read_manifest

    assert read_manifest(doubling(tmp_path / "a.tokopt")).pipeline == "tome{r=16}"
    with pytest.raises(ArtifactError, match="is not a folder"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="has no manifest"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b" " * (17 * 2**20))
    with pytest.raises(ArtifactError, match="larger than"):
        read_manifest(tmp_path)
