"""tokopt's own CPU kernels are used where those that are installed fit, and else the form without them runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import numpy._core._multiarray_umath as multiarray
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import tokopt
from tests.lower.test_cpu import OWN, artifact, built
from tests.matrix import language
from tests.runtime.artifacts import rehash, sealed
from tokopt.errors import ArtifactError, InputError, TokoptError
from tokopt.kernels import cpu
from tokopt.runtime import Model, load
from tokopt.runtime.format.manifest import ONE_ROW, PORTABLE

pytestmark = built

X = np.random.default_rng(0).standard_normal((2, 5, 64), dtype=np.float32)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact("rtn{group=32}")[1], tmp_path / "copy.tokopt"))


def portable(path: Path) -> np.ndarray:
    return load(path, threads=1, kernels=False)(X)


def test_what_is_used_can_be_seen(copy: Path) -> None:
    model, plain = (load(copy, threads=1, kernels=wanted) for wanted in (True, False))
    assert model.sessions.forms("forward") == (PORTABLE, OWN) and plain.sessions.forms("forward") == (
        PORTABLE,
    )
    assert str(model.kernels) == f"tokopt.cpu {cpu.VERSION} ({cpu.isa()})"
    assert str(plain.kernels) == "none: they were not asked for"
    assert model.kernels.library == cpu.library() and plain.kernels.library is None
    assert not np.array_equal(model(X), plain(X))  # they round activations in different ways
    np.testing.assert_allclose(model(X), plain(X), atol=0.05)


def test_a_flag_is_a_flag(copy: Path) -> None:
    with pytest.raises(InputError, match=r"kernels is 1 \(int\), it must be True or False"):
        load(copy, kernels=1)  # type: ignore[arg-type]


def runs_without(path: Path, reason: str) -> None:
    model: Model = load(path, threads=1)
    assert model.sessions.forms("forward") == (PORTABLE,)
    assert str(model.kernels) == f"none: {reason}"
    np.testing.assert_array_equal(model(X), portable(path))


def test_kernels_of_another_version(copy: Path) -> None:
    doc = json.loads((copy / "manifest.json").read_text())
    doc["programs"]["forward"]["kernels"] = cpu.VERSION + 1
    (copy / "manifest.json").write_text(json.dumps(sealed(doc)))
    wanted, found = cpu.VERSION + 1, cpu.VERSION
    runs_without(copy, f"the artifact takes their version {wanted} and {found} is installed")


def test_no_kernels(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)
    monkeypatch.setattr(cpu, "problem", lambda: "there was no compiler; install one.")
    runs_without(copy, "there was no compiler; install one.")


def test_a_library_without_the_symbol(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is a shared library, and no kernels of ONNX Runtime."""
    other = Path(str(multiarray.__file__))
    monkeypatch.setattr(cpu, "library", lambda: other)
    model: Model = load(copy, threads=1)
    assert model.kernels.library is None and "ONNX Runtime cannot load them" in model.kernels.reason
    assert "RegisterCustomOps" in model.kernels.reason
    np.testing.assert_array_equal(model(X), portable(copy))


def test_another_provider(copy: Path) -> None:
    names = onnxruntime.get_available_providers()
    if len(names) < 2:
        pytest.skip("ONNX Runtime has the CPU provider alone")
    model: Model = load(copy, threads=1, providers=names)
    assert str(model.kernels) == "none: they run on the CPU provider alone"


def test_an_instruction_set_that_is_not_there(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKOPT_ISA", "abacus")
    with pytest.raises(TokoptError, match="TOKOPT_ISA=abacus cannot be used on this processor; use one of"):
        load(copy, threads=1)
    assert load(copy, threads=1, kernels=False)(X).shape == (2, 5, 48)


def test_no_library_comes_out_of_an_artifact(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that the manifest lists, nor one that stands beside the weights under the name of tokopt's own."""
    library = cpu.library()
    assert library is not None
    doc = json.loads((copy / "manifest.json").read_text())
    for name in (library.name, "libtokopt_cpu.so"):
        shutil.copy(library, copy / name)
        doc["files"][name] = {}
    (copy / "manifest.json").write_text(json.dumps(doc))
    rehash(copy)
    register, registered = onnxruntime.SessionOptions.register_custom_ops_library, set[str]()

    def spy(options: onnxruntime.SessionOptions, path: str) -> None:
        registered.add(path)
        register(options, path)

    monkeypatch.setattr(onnxruntime.SessionOptions, "register_custom_ops_library", spy)
    monkeypatch.chdir(copy)
    load(copy, threads=1)(X)
    assert registered == {str(library)} and copy not in library.parents


def test_an_attribute_out_of_range(copy: Path) -> None:
    """One sentence when the artifact is loaded, and what it says to do works."""
    file = copy / json.loads((copy / "manifest.json").read_text())["programs"]["forward"]["files"][OWN]
    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "bits":
                attribute.i = 5
    file.write_bytes(model.SerializeToString())
    rehash(copy)
    with pytest.raises(
        ArtifactError, match=r"^[^\n]*cannot load [^\n]*bits[^\n]*; load it with kernels=False$"
    ):
        load(copy, threads=1)
    assert portable(copy).shape == (2, 5, 48)


def test_verify_asks_this_form_whether_it_computes_the_program(copy: Path) -> None:
    """One scale that is 5 % too large is lost in the rounding of activations, and found in float32."""
    assert tokopt.verify(copy).ok
    file = copy / json.loads((copy / "manifest.json").read_text())["programs"]["forward"]["files"][OWN]
    model = onnx.load(file)
    node = next(node for node in model.graph.node if node.domain == cpu.DOMAIN)
    (scale,) = (tensor for tensor in model.graph.initializer if tensor.name == node.input[2])
    numbers = np.array(numpy_helper.to_array(scale))
    numbers[0, 0] *= 1.05
    scale.CopyFrom(numpy_helper.from_array(numbers, scale.name))
    file.write_bytes(model.SerializeToString())
    rehash(copy)
    report = tokopt.verify(copy)
    failed = {key for key, checks in report.outputs.items() if not all(check.ok for check in checks)}
    assert failed == {f"forward.{OWN}"}
    assert all(check.ok for checks in report.tasks.values() for check in checks)


@pytest.mark.parametrize("version", [1, cpu.VERSION])
def test_a_form_of_older_versions_is_ignored(version: int, tmp_path: Path) -> None:
    """Version 1 of the kernels had a form beside that for one row; the others of its artifact run."""
    made = language.artifact("llama", "rtn{group=32}")
    path = Path(shutil.copytree(made.path, tmp_path / "old.tokopt"))
    doc = json.loads((path / "manifest.json").read_text())
    files = doc["programs"]["step"]["files"]
    files["cpu-onnxruntime"] = "step.cpu-onnxruntime.onnx"
    shutil.copy(path / files[OWN], path / files["cpu-onnxruntime"])
    doc["files"][files["cpu-onnxruntime"]] = {}
    doc["programs"]["step"]["kernels"] = version
    (path / "manifest.json").write_text(json.dumps(doc))
    rehash(path)
    model = load(path, threads=1)
    own = (OWN,) if version == cpu.VERSION else ()
    assert model.sessions.forms("step") == (PORTABLE, ONE_ROW, *own)
    ids = language.prompt(9)
    wanted = made if own else load(made.path, threads=1, kernels=False)
    assert model.generate(ids, max_tokens=8) == wanted.generate(ids, max_tokens=8)
    assert model.generate([ids, ids], max_tokens=8) == wanted.generate([ids, ids], max_tokens=8)
    assert tokopt.verify(path).ok
