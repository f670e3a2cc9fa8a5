"""Small artifacts written by hand with onnx: no torch, no compiler."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save

from tokopt.runtime.format.entries import SEAL, seal
from tokopt.runtime.format.manifest import FORMAT_VERSION

Json = dict[str, Any]

VOCABULARY = 7


def tensor(name: str, dtype: str, *axes: str | int, role: str = "input", state: str | None = None) -> Json:
    return {"name": name, "dtype": dtype, "axes": list(axes), "role": role, "state": state}


def document(inputs: list[Json], outputs: list[Json], ranges: Json, **more: object) -> Json:
    """A manifest with one program and no files yet."""
    program = {
        "inputs": inputs,
        "outputs": outputs,
        "ranges": ranges,
        "files": {"onnx": "forward.onnx"},
        "engine": None,
        "aliases": {},
        "kernels": None,
    }
    return {
        "format_version": FORMAT_VERSION,
        "programs": {"forward": program},
        "files": {},
        "states": [],
        "links": [],
        "schedule": {
            "entries": [{"program": "forward", "role": "encode", "slots": 0}],
            "triggers": [],
            "endless": False,
        },
        "generation": None,
        "semantics": "approximate",
        "pipeline": "tome{r=16}",
        "passes": [{"text": "tome{r=16}", "matches": 12, "semantics": "approximate", "notes": ["a note"]}],
        "tokenizer": None,
        "selftest": None,
        "versions": {"tokopt": "0.1.0"},
        **more,
    }


def write(folder: Path, doc: Json, files: dict[str, bytes]) -> Path:
    """Write files and the manifest that lists them."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
        doc["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / "manifest.json").write_text(json.dumps(sealed(doc)))
    return folder


def sealed(doc: Json) -> Json:
    """The manifest with its own hash, where its format has one."""
    return {**doc, SEAL: seal(doc)} if doc["format_version"] >= 4 else doc


def rehash(folder: Path) -> None:
    """Let the manifest say what the files are: whoever can write them can write it."""
    doc = json.loads((folder / "manifest.json").read_text())
    for name in doc["files"]:
        data = (folder / name).read_bytes()
        doc["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / "manifest.json").write_text(json.dumps(sealed(doc)))


def graph(nodes: list[onnx.NodeProto], inputs: dict, outputs: dict, constants: dict | None = None) -> bytes:
    """The bytes of an ONNX model; inputs and outputs are name -> (type, axes)."""
    taken, given = [
        [helper.make_tensor_value_info(name, kind, axes) for name, (kind, axes) in side.items()]
        for side in (inputs, outputs)
    ]
    weights = [onnx.numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    made = helper.make_graph(nodes, "forward", taken, given, weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


def doubling(folder: Path, change: Callable[[Json], object] = lambda doc: None) -> Path:
    """``doubled = 2 * images``, with images float32[batch (at most 4), 3] and a self-test."""
    shape = (TensorProto.FLOAT, ["batch", 3])
    node = helper.make_node("Add", ["images", "images"], ["doubled"])
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    test = {"forward/inputs/images": x, "forward/outputs/doubled": x + x}
    doc = document(
        [tensor("images", "float32", "batch", 3)],
        [tensor("doubled", "float32", "batch", 3, role="output")],
        {"batch": {"min": 1, "max": 4}},
        selftest="selftest.safetensors",
    )
    change(doc)
    model = graph([node], {"images": shape}, {"doubled": shape})
    return write(folder, doc, {"forward.onnx": model, "selftest.safetensors": save(test)})


def embedding(folder: Path) -> Path:
    """Two inputs that share axes and two outputs: ``vectors = table[ids] * mask`` and their ``total``."""
    ids = (TensorProto.INT64, ["batch", "tokens"])
    mask = (TensorProto.FLOAT, ["batch", "tokens", 1])
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0),
        helper.make_node("Mul", ["rows", "mask"], ["vectors"]),
        helper.make_node("ReduceSum", ["vectors"], ["total"], keepdims=0),
    ]
    outputs = {"vectors": (TensorProto.FLOAT, ["batch", "tokens", 2]), "total": (TensorProto.FLOAT, [])}
    table = np.arange(2 * VOCABULARY, dtype=np.float32).reshape(VOCABULARY, 2)
    doc = document(
        [
            tensor("ids", "int64", "batch", "tokens"),
            tensor("mask", "float32", "batch", "tokens", 1),
        ],
        [
            tensor("vectors", "float32", "batch", "tokens", 2, role="output"),
            tensor("total", "float32", role="output"),
        ],
        {"batch": {"min": 1, "max": None}, "tokens": {"min": 2, "max": 9}},
    )
    return write(
        folder, doc, {"forward.onnx": graph(nodes, {"ids": ids, "mask": mask}, outputs, {"table": table})}
    )
