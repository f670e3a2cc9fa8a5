"""The runtime: what fits is run, what does not is an InputError of one sentence before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.runtime.artifacts import VOCABULARY, document, doubling, embedding, graph, tensor, write
from tokopt.errors import ArtifactError, InputError, MissingDependencyError, TokoptError
from tokopt.runtime import Model, Outputs, load
from tokopt.runtime.numerics import OutputCheck

X = np.arange(6, dtype=np.float32).reshape(2, 3)
IDS = np.array([[0, 1, 2], [3, 4, 5]])
MASK = np.ones((2, 3, 1), np.float32)


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(doubling(tmp_path_factory.mktemp("double") / "double.tokopt"))


@pytest.fixture(scope="module")
def embed(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(embedding(tmp_path_factory.mktemp("embed") / "embed.tokopt"), threads=1)


def test_one_output_is_an_array(double: Model) -> None:
    layouts = (X, np.asfortranarray(X), X.astype(">f4"), memoryview(cast(Any, X)), X[:, ::-1].copy()[:, ::-1])
    for got in (double(images=X), *map(double, layouts)):
        assert isinstance(got, np.ndarray)
        np.testing.assert_array_equal(got, 2 * X)


def test_several_outputs_are_a_mapping_with_attributes(embed: Model) -> None:
    out = embed(IDS, mask=MASK)
    assert isinstance(out, Outputs) and isinstance(out, Mapping)
    assert list(out) == ["vectors", "total"] and len(out) == 2 and "total" in dir(out)
    np.testing.assert_array_equal(out.vectors, out["vectors"])
    assert out.vectors.shape == (2, 3, 2) and out.total == out.vectors.sum()
    assert repr(out) == "Outputs(vectors=float32[2, 3, 2], total=float32[])"
    with pytest.raises(AttributeError, match="no output 'other'; there are vectors, total"):
        _ = out.other


def test_signature_and_repr(embed: Model) -> None:
    assert [t.name for t in embed.signature.inputs] == ["ids", "mask"]
    assert embed.manifest.pipeline == "tome{r=16}"
    assert "ids: int64[batch, tokens], mask: float32[batch, tokens, 1] -> vectors" in repr(embed)


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.copy()
    changed.flat[-1] = value
    return changed


BAD_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "missing": ((IDS,), {}, "input 'mask' is missing; give mask: float32"),
    "too many": ((IDS, MASK, MASK), {}, "3 inputs were given, the program takes 2: ids, mask"),
    "unknown": ((IDS,), {"msk": MASK}, "there is no input 'msk'; the program takes ids, mask"),
    "twice": ((IDS, MASK), {"mask": MASK}, "input 'mask' was given twice"),
    "dtype": ((IDS.astype(np.int32), MASK), {}, r"input 'ids' is int32.*int64.*astype\('int64'\)"),
    "rank": ((IDS[0], MASK), {}, r"input 'ids' has 1 axes \(shape \[3\]\).*int64\[batch, tokens\]"),
    "size": ((IDS, np.ones((2, 3, 2), np.float32)), {}, "axis 2 of input 'mask' has size 2"),
    "differing": (
        (IDS, MASK[:1]),
        {},
        "axis 'batch' has size 1 in input 'mask' but 2 in 'ids'; make them equal",
    ),
    "empty": ((IDS[:0], MASK[:0]), {}, "axis 'batch' of input 'ids' has size 0, it must be at least 1"),
    "short": ((IDS[:, :1], MASK[:, :1]), {}, "axis 'tokens'.*size 1, it must be at least 2 and at most 9"),
    "long": ((np.zeros((1, 10), int), MASK), {}, "size 10, it must be at least 2 and at most 9"),
    "nan": ((IDS, with_value(MASK, np.nan)), {}, "input 'mask' holds NaN or infinity"),
    "infinity": ((IDS, with_value(MASK, -np.inf)), {}, "input 'mask' holds NaN or infinity"),
    "not numbers": ((IDS, "mask"), {}, "input 'mask' is <U4"),
    "ragged": (([[1, 2], [3]], MASK), {}, "input 'ids' is a list that numpy cannot read"),
    "none": ((None, MASK), {}, "input 'ids' is object"),
}


@pytest.mark.parametrize(("arrays", "named", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_input_that_does_not_fit(embed: Model, arrays: tuple, named: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        embed(*arrays, **named)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.finfo(np.float32).max, -np.finfo(np.float32).max])
def test_a_sum_that_overflows_is_no_infinity(double: Model, value: float) -> None:
    assert np.isinf(
        double(np.full((2, 3), value, np.float32))
    ).all()  # the input is finite, its double is not


def test_values_that_only_the_graph_can_refuse(embed: Model) -> None:
    with pytest.raises(TokoptError, match=r"the engine failed .* on inputs that fit") as caught:
        embed(np.full((1, 2), VOCABULARY), np.ones((1, 2, 1), np.float32))
    assert "\n" not in str(caught.value)


def test_selftest_compares_with_the_stored_outputs(double: Model, embed: Model) -> None:
    (check,) = double.selftest()
    assert isinstance(check, OutputCheck)
    assert check.name == "doubled" and check.nmse == 0.0 and check.ok
    with pytest.raises(ArtifactError, match="no self-test"):
        embed.selftest()


def test_selftest_that_is_no_safetensors_file(tmp_path: Path) -> None:
    folder = doubling(tmp_path / "a.tokopt")
    (folder / "selftest.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ArtifactError, match=r"selftest.safetensors has 100 bytes"):
        load(folder)
    with pytest.raises(ArtifactError, match=r"selftest.safetensors is damaged"):
        load(folder, verify=False).selftest()


def test_providers_and_threads(tmp_path: Path) -> None:
    folder = doubling(tmp_path / "a.tokopt")
    for providers in (["CPUExecutionProvider"], [("CPUExecutionProvider", {})], "CPUExecutionProvider"):
        session = load(folder, providers=providers).sessions.get("forward")
        assert session.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(
        InputError, match=r"'GPU' is no execution provider.*CPUExecutionProvider.*tokopt\[gpu\]"
    ):
        load(folder, providers=["GPU"])
    with pytest.raises(InputError, match="providers is empty"):
        load(folder, providers=[])
    wrong: list[Any] = [0, -1, 1.5, True, "2"]
    for threads in wrong:
        with pytest.raises(InputError, match="threads is"):
            load(folder, threads=threads)


def test_provider_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingDependencyError, match=r"CUDAExecutionProvider is not part.*tokopt\[gpu\]"):
        load(doubling(tmp_path / "a.tokopt"), providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_damage_is_found_unless_not_looked_for(tmp_path: Path) -> None:
    folder = doubling(tmp_path / "a.tokopt")
    path = folder / "forward.onnx"
    data = bytearray(path.read_bytes())
    data[data.index(b"Add")] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"forward.onnx is damaged"):
        load(folder)
    with pytest.raises(ArtifactError, match=r"cannot load|no ONNX file|contradicts"):
        load(folder, verify=False)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"forward.onnx is missing"):
        load(folder)


def test_artifacts_that_are_not_for_this_runtime(tmp_path: Path) -> None:
    def torch_only(doc: dict) -> None:
        doc["programs"]["forward"]["files"] = {"torch": "forward.onnx"}

    def renamed(doc: dict) -> None:
        doc["programs"] = {"step": doc["programs"]["forward"]}  # the schedule still says forward

    with pytest.raises(
        ArtifactError,
        match=r"no ONNX form of program 'forward', only torch; export it for the runtime with: tokopt",
    ):
        load(doubling(tmp_path / "a", torch_only))
    with pytest.raises(ArtifactError, match="names the program 'forward', which is not there"):
        load(doubling(tmp_path / "b", renamed))


def test_external_data_cannot_reach_outside_the_folder(tmp_path: Path) -> None:
    """The path of weights is inside the ONNX file, where the manifest does not see it."""
    (tmp_path / "secret").write_bytes(np.ones(3, np.float32).tobytes())
    shape = (TensorProto.FLOAT, [3])
    node = helper.make_node("Add", ["x", "w"], ["y"])
    model = onnx.load_from_string(graph([node], {"x": shape}, {"y": shape}, {"w": np.ones(3, np.float32)}))
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for location in ("../secret", str(tmp_path / "secret")):
        del weight.external_data[:]
        weight.external_data.add(key="location", value=location)
        doc = document([tensor("x", "float32", 3)], [tensor("y", "float32", 3, role="output")], {})
        name = f"{len(location)}.tokopt"
        with pytest.raises(ArtifactError, match="does not list"):
            load(write(tmp_path / name, doc, {"forward.onnx": model.SerializeToString()}))


# --- OpenVINO ------------------------------------------------------------------------------------------------


def test_openvino_gives_the_same(double: Model, embed: Model) -> None:
    """Inputs are checked alike; the self-test runs on the engine that was asked for."""
    other = load(double.path, backend="openvino", threads=1)
    np.testing.assert_array_equal(other(X), 2 * X)
    assert all(check.ok for check in other.selftest())
    with pytest.raises(InputError, match="NaN or infinity"):
        other(np.full_like(X, np.nan))
    several, wanted = load(embed.path, backend="openvino")(IDS, mask=MASK), embed(IDS, mask=MASK)
    assert list(several) == list(wanted)
    for name in wanted:
        np.testing.assert_allclose(several[name], wanted[name], rtol=1e-6)


def test_openvino_takes_its_own_options(double: Model) -> None:
    load(double.path, backend=("openvino", {"INFERENCE_PRECISION_HINT": "bf16"}))
    with pytest.raises(InputError, match=r"OpenVINO cannot compile .*; check the options"):
        load(double.path, backend=("openvino", {"INFERENCE_PRECISION_HINT": "f3"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tvm"}, "backend is 'tvm' \\(str\\), it must be one of onnxruntime, openvino"),
        ({"backend": "openvino", "providers": ["CPUExecutionProvider"]}, "leave them out"),
        ({"backend": "openvino", "threads": 0}, "threads is 0"),
    ],
)
def test_bad_backends_are_refused(double: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(double.path, **options)


def test_openvino_missing_names_the_extra(double: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"install tokopt\[openvino\]"):
        load(double.path, backend="openvino")
