"""A manifest that contradicts itself or its files is refused when it is read, not when the model runs.

A state that was removed or renamed, an output of 2^40 numbers, or an endless text that nothing shortens loaded, and
raised KeyError, ValueError or MemoryError on the first call. The law: laws between the parts of a manifest, and between
it and what ONNX files say of themselves, are checked before an engine is opened. Each sample carries the right hashes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import tokopt
from tests.runtime import toys
from tests.runtime.artifacts import doubling, rehash, sealed
from tokopt.errors import ArtifactError
from tokopt.runtime import load
from tokopt.runtime.format.manifest import MANIFEST, read_manifest

OLD = Path(__file__).parent.parent / "data" / "artifacts" / "format2"

Json = dict[str, Any]


@pytest.fixture(params=["h2o-int8", "toy"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A language model of one program and an eviction, and one of four programs, in the newest format."""
    if request.param == "toy":
        return toys.save(tmp_path / "toy", toys.toy())
    made = Path(shutil.copytree(OLD / request.param, tmp_path / "model"))
    (made / MANIFEST).write_text(read_manifest(made).to_json())
    return made


def change(path: Path, edit: Callable[[Json], object]) -> None:
    doc = json.loads((path / MANIFEST).read_text())
    edit(doc)
    (path / MANIFEST).write_text(json.dumps(sealed(doc)))


def tensors(doc: Json, side: str) -> list[Json]:
    return [tensor for program in doc["programs"].values() for tensor in program[side]]


def forget_a_state(doc: Json) -> None:
    """Everywhere: what the program reads and writes is no longer said."""
    gone = doc["states"].pop()["name"]
    for program in doc["programs"].values():
        named = {t["name"] for side in ("inputs", "outputs") for t in program[side] if t["state"] == gone}
        for side in ("inputs", "outputs"):
            program[side] = [t for t in program[side] if t["state"] != gone]
        program["aliases"] = {k: v for k, v in program["aliases"].items() if not named & {k, v}}


def remove_a_state(doc: Json) -> None:
    doc["states"].pop()


def rename_a_state(doc: Json) -> None:
    doc["states"][0]["name"] = "another"


def rename_an_input(doc: Json) -> None:
    tensors(doc, "inputs")[0]["name"] = "another"


def rename_an_output(doc: Json) -> None:
    tensors(doc, "outputs")[0]["name"] = "another"


def an_output_too_many(doc: Json) -> None:
    program = next(iter(doc["programs"].values()))
    program["outputs"].append({**program["outputs"][0], "name": "another", "role": "link"})


def huge_output(doc: Json) -> None:
    for tensor in tensors(doc, "outputs"):
        if tensor["role"] in ("logits", "link"):
            tensor["axes"][-1] = 2**40
    doc["generation"]["vocabulary"] = 2**40


def another_dtype(doc: Json) -> None:
    state = doc["states"][-1]
    for tensor in [state, *tensors(doc, "inputs"), *tensors(doc, "outputs")]:
        if tensor.get("state", state["name"]) == state["name"]:
            tensor["dtype"] = "int16"


def named_where_it_is_a_number(doc: Json) -> None:
    for tensor in tensors(doc, "outputs"):
        if tensor["role"] == "logits":
            tensor["axes"][-1] = "vocabulary"


def exchanged_files(doc: Json) -> None:
    first, *_, last = doc["programs"].values()
    first["files"], last["files"] = last["files"], first["files"]


def endless_without_end(doc: Json) -> None:
    doc["schedule"] |= {"triggers": [], "endless": True}


def endless_too_late(doc: Json) -> None:
    program = next(trigger["program"] for trigger in doc["schedule"]["triggers"])
    late = {"program": program, "after": "tokens", "every": doc["generation"]["context"] + 1, "prompt": True}
    doc["schedule"] |= {"triggers": [late], "endless": True}


def a_token_that_no_tokenizer_has(doc: Json) -> None:
    doc["generation"]["eos"] = [2**40]


CONTRADICTIONS = [
    forget_a_state,
    remove_a_state,
    rename_a_state,
    rename_an_input,
    rename_an_output,
    an_output_too_many,
    huge_output,
    another_dtype,
    named_where_it_is_a_number,
    exchanged_files,
    endless_without_end,
    endless_too_late,
    a_token_that_no_tokenizer_has,
]


@pytest.mark.parametrize("edit", CONTRADICTIONS, ids=lambda edit: edit.__name__)
def test_a_contradiction_is_refused_when_it_is_read(edit: Callable[[Json], None], path: Path) -> None:
    load(path)
    change(path, edit)
    for verified in (True, False):
        with pytest.raises(ArtifactError) as caught:
            load(path, verify=verified)
        assert "\n" not in str(caught.value)
    with suppress(ArtifactError):
        assert not tokopt.verify(path).ok


def test_endless_of_format_2_without_compaction(tmp_path: Path) -> None:
    path = Path(shutil.copytree(OLD / "h2o-int8", tmp_path / "model"))
    doc = json.loads((path / MANIFEST).read_text())
    doc["generation"] |= {"compact_every": 0, "endless": True}
    (path / MANIFEST).write_text(json.dumps(doc))
    with pytest.raises(ArtifactError, match="is endless and no trigger runs after tokens"):
        load(path)


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_file_that_says_a_name_twice(side: str, tmp_path: Path) -> None:
    """The first could fit and the second be what an engine takes."""
    path = doubling(tmp_path / "a")
    model = onnx.load(path / "forward.onnx")
    values = getattr(model.graph, side)
    values.append(values[0])
    (path / "forward.onnx").write_bytes(model.SerializeToString())
    rehash(path)
    with pytest.raises(ArtifactError, match="twice"):
        load(path)


def test_a_trigger_far_away_takes_no_memory(tmp_path: Path) -> None:
    """Free slots are those until the context ends."""
    path = toys.save(tmp_path / "toy", toys.toy())
    change(path, lambda doc: doc["schedule"]["triggers"][-1].update(every=2**40))
    model = load(path)
    assert (
        len(model.generate([1, 2, 3], max_tokens=9, inputs={"images": np.ones((1, 2), np.float32)}).tokens)
        == 9
    )
