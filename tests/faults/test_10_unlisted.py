"""A file that the manifest does not list is never read, whatever refers to it.

The names of weights stand in ONNX files, and the engine resolves them: weights without an entry in the manifest were
loaded without a hash, and only ONNX Runtime's newest version stopped ``../`` and links; ``manifest.json`` could be a
link. The law: every name in an ONNX file is held against the manifest before an engine sees the file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, external_data_helper, helper

import tokopt
from tests.runtime.artifacts import document, doubling, tensor, write
from tokopt.errors import ArtifactError
from tokopt.runtime import load
from tokopt.runtime.format.onnx_file import Malformed, OnnxFile, read_onnx

EXPORTED = Path(__file__).parent.parent / "data" / "artifacts"

WEIGHTS = np.arange(512, dtype=np.float32)


def external(location: str) -> TensorProto:
    """A tensor whose bytes lie in a file."""
    made = TensorProto(name="weights", data_type=TensorProto.FLOAT, dims=[len(WEIGHTS)])
    made.data_location = TensorProto.EXTERNAL
    made.external_data.add(key="location", value=location)
    return made


def in_an_initializer(made: TensorProto) -> onnx.ModelProto:
    return _model([], [made])


def in_a_constant(made: TensorProto) -> onnx.ModelProto:
    return _model([helper.make_node("Constant", [], ["weights"], value=made)], [])


def in_a_branch(made: TensorProto) -> onnx.ModelProto:
    """A graph within a node within a graph."""
    out = [helper.make_tensor_value_info("kept", TensorProto.FLOAT, [len(WEIGHTS)])]
    branch = helper.make_graph(
        [helper.make_node("Identity", ["weights"], ["kept"])], "branch", [], out, [made]
    )
    no = helper.make_tensor("no", TensorProto.BOOL, [], [False])
    nodes = [
        helper.make_node("Constant", [], ["condition"], value=no),
        helper.make_node("If", ["condition"], ["weights"], then_branch=branch, else_branch=branch),
    ]
    return _model(nodes, [])


def in_a_function(made: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["weights"], value=made)
    opset = helper.make_opsetid("", 21)
    function = helper.make_function("tokopt", "Weights", [], ["weights"], [node], [opset])
    model = _model([helper.make_node("Weights", [], ["weights"], domain="tokopt")], [])
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("tokopt", 1))
    return model


def _model(nodes: list[onnx.NodeProto], initializers: list[TensorProto]) -> onnx.ModelProto:
    given, made = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", len(WEIGHTS)]) for name in ("x", "y")
    )
    nodes = [*nodes, helper.make_node("Mul", ["x", "weights"], ["y"])]
    graph = helper.make_graph(nodes, "forward", [given], [made], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


PLACES = pytest.mark.parametrize(
    "make", [in_an_initializer, in_a_constant, in_a_branch, in_a_function], ids=lambda make: make.__name__
)


def artifact(folder: Path, model: onnx.ModelProto, *, listed: bool) -> Path:
    """``y = x * weights``, with the weights in a file of their own."""
    axes = ("batch", len(WEIGHTS))
    doc = document(
        [tensor("x", "float32", *axes)],
        [tensor("y", "float32", *axes, role="output")],
        {"batch": {"min": 1, "max": None}},
    )
    data = {"weights.data": WEIGHTS.tobytes()}
    write(folder, doc, {"forward.onnx": model.SerializeToString(), **(data if listed else {})})
    (folder / "weights.data").write_bytes(data["weights.data"])
    return folder


@PLACES
def test_weights_that_are_not_listed_are_not_loaded(
    make: Callable[[TensorProto], Any], tmp_path: Path
) -> None:
    path = artifact(tmp_path / "a", make(external("weights.data")), listed=False)
    for verified in (True, False):
        with pytest.raises(
            ArtifactError, match=r"refers to the file 'weights.data', which the manifest does not"
        ):
            load(path, verify=verified)
    report = tokopt.verify(path)
    assert not report.ok and "does not list" in report.faults[0]


def test_weights_that_are_listed_are_loaded(tmp_path: Path) -> None:
    path = artifact(tmp_path / "a", in_an_initializer(external("weights.data")), listed=True)
    np.testing.assert_array_equal(load(path)(np.ones((1, 512), np.float32))[0], WEIGHTS)


@PLACES
@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "", "weights.data/../../secret", "a\\b"])
def test_weights_outside(make: Callable[[TensorProto], Any], location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(WEIGHTS.tobytes())
    path = artifact(tmp_path / "a", make(external(location)), listed=True)
    with pytest.raises(ArtifactError, match="does not list"):
        load(path)


def test_the_last_of_two_locations_counts_no_more_than_the_first(tmp_path: Path) -> None:
    """Whichever of them an engine believes."""
    made = external("weights.data")
    made.external_data.add(key="location", value="../secret")
    path = artifact(tmp_path / "a", in_an_initializer(made), listed=True)
    with pytest.raises(ArtifactError, match=r"'\.\./secret'"):
        load(path)


def test_an_op_that_names_files(tmp_path: Path) -> None:
    node = helper.make_node(
        "EPContext", [], ["weights"], domain="com.microsoft", ep_cache_context="../secret"
    )
    path = artifact(tmp_path / "a", _model([node], []), listed=True)
    with pytest.raises(ArtifactError, match="EPContext"):
        load(path)


@pytest.mark.parametrize("name", ["manifest.json", "forward.onnx", "weights.data", "selftest.safetensors"])
def test_no_file_is_a_link(name: str, tmp_path: Path) -> None:
    path = artifact(tmp_path / "a", in_an_initializer(external("weights.data")), listed=True)
    if name == "selftest.safetensors":
        path = doubling(tmp_path / "b")
    shutil.move(path / name, tmp_path / name)
    (path / name).symlink_to(tmp_path / name)
    for call in (lambda: load(path, verify=False).selftest(), lambda: load(path)):
        with pytest.raises(ArtifactError, match="is a symbolic link"):
            call()


def test_the_weights_of_an_exported_artifact_are_found() -> None:
    """And all of them: onnx finds the same names."""
    found: set[str] = set()
    for path in EXPORTED.glob("*/*/*.onnx"):
        data = path.read_bytes()
        tensors = external_data_helper._get_all_tensors(onnx.load_model_from_string(data))
        entries = [entry for made in tensors for entry in made.external_data if entry.key == "location"]
        assert read_onnx(data).locations == {entry.value for entry in entries}
        found |= read_onnx(data).locations
    assert found == {"weights.data"}


@given(st.binary(max_size=64), st.integers(0, 1000))
def test_any_bytes_are_an_onnx_file_or_none(data: bytes, cut: int) -> None:
    """Alone, and within a whole file."""
    whole = in_a_branch(external("weights.data")).SerializeToString()
    cut %= len(whole)
    for content in (data, whole[:cut] + data + whole[cut + len(data) :], whole[:cut]):
        with suppress(Malformed):
            assert isinstance(read_onnx(content), OnnxFile)
