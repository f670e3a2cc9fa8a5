"""Artifacts: what is exported runs without torch and equals the bundle; a failure leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

import tokopt
import tokopt.lower.onnx.export
import tokopt.place
from tests.lower.encoders import text, vision
from tests.runtime.artifacts import rehash
from tokopt.errors import ArtifactError, CaptureError, LoweringError
from tokopt.ir.assemble import assemble
from tokopt.runtime import Outputs, load

TEXT = "a tokenizer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def merged() -> tokopt.Bundle:
    return tokopt.optimize(vision(), "tome{r=3}")


@pytest.fixture(scope="module")
def onnx_artifact(folder: Path, merged: tokopt.Bundle) -> Path:
    return tokopt.export(merged, folder / "merged.tokopt")


@pytest.fixture(scope="module")
def torch_artifact(folder: Path, merged: tokopt.Bundle) -> Path:
    return tokopt.export(replace(merged, tokenizer=TEXT), folder / "merged-torch.tokopt", target="torch")


@pytest.fixture
def copy(onnx_artifact: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(onnx_artifact, tmp_path / "copy.tokopt"))


def resize(tensors: tuple[torch.Tensor, ...], size: int) -> tuple[torch.Tensor, ...]:
    return tuple(t[torch.arange(size) % len(t)] for t in tensors)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_runtime_equals_the_bundle(onnx_artifact: Path, merged: tokopt.Bundle, batch: int) -> None:
    inputs = resize(merged.main.example, batch)
    got = load(onnx_artifact)(*(t.numpy() for t in inputs))
    assert isinstance(got, Outputs) and list(got) == ["tokens", "pooled"]
    for want, have in zip(merged(*inputs), got.values(), strict=True):
        np.testing.assert_allclose(have, want.numpy(), rtol=1e-4, atol=1e-5)


def test_dynamic_tokens(tmp_path: Path) -> None:
    bundle = text()
    model = load(tokopt.export(bundle, tmp_path / "text.tokopt"))
    for tokens in (1, 5, 64):
        ids = torch.randint(50, (2, tokens))
        mask = torch.ones(2, tokens, dtype=torch.int64)
        mask[1, tokens // 2 + 1 :] = 0
        np.testing.assert_allclose(
            model(ids.numpy(), mask.numpy()), bundle(ids, mask)[0].numpy(), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(tokopt.TokoptError, match="size 65, it must be at least 1 and at most 64"):
        model(np.zeros((1, 65), np.int64), np.ones((1, 65), np.int64))


def test_manifest_tells_what_was_done(onnx_artifact: Path, merged: tokopt.Bundle) -> None:
    manifest = load(onnx_artifact).manifest
    assert manifest.pipeline == merged.pipeline == "tome{r=3}" and manifest.semantics == "approximate"
    assert manifest.passes[0].matches == merged.history[0].matches
    assert set(manifest.files) == {"forward.onnx", "weights.data", "selftest.safetensors"}
    assert {p.name for p in onnx_artifact.iterdir()} == {"manifest.json", *manifest.files}
    assert {"tokopt", "torch", "onnx", "onnxruntime"} <= set(manifest.versions)


def test_torch_artifact_opens_as_the_same_bundle(
    torch_artifact: Path, merged: tokopt.Bundle, tmp_path: Path
) -> None:
    opened = tokopt.open_bundle(torch_artifact)
    program, want = opened.main, merged.main
    assert opened == replace(merged, tokenizer=TEXT, programs=opened.programs)
    assert (program.inputs, program.outputs, program.ranges) == (want.inputs, want.outputs, want.ranges)
    for a, b in zip(program.example, want.example, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(opened(*program.example), merged(*want.example), strict=True):
        assert torch.equal(a, b)
    assert tokopt.verify(
        tokopt.export(opened, tmp_path / "again.tokopt")
    ).ok  # and it lowers like the original


def test_pt2_file_opens_as_a_bundle(tmp_path: Path) -> None:
    torch.export.save(assemble(vision().main), tmp_path / "vit.pt2")
    example = vision().main.example
    for a, b in zip(tokopt.open_bundle(tmp_path / "vit.pt2")(*example), vision()(*example), strict=True):
        torch.testing.assert_close(a, b)


def test_pt2_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "vit.pt2").write_bytes(b"no archive")
    with pytest.raises(CaptureError, match=r"vit.pt2"):
        tokopt.open_bundle(tmp_path / "vit.pt2")


def test_onnx_artifact_is_no_bundle(onnx_artifact: Path) -> None:
    with pytest.raises(
        ArtifactError, match="exported for onnx, which cannot become a bundle again; give what it was"
    ):
        tokopt.open_bundle(onnx_artifact)


def test_torch_artifact_is_not_for_the_runtime(torch_artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="no ONNX form of program 'forward', only torch"):
        load(torch_artifact)


def test_verify_reports_every_output(onnx_artifact: Path, torch_artifact: Path) -> None:
    """Of ONNX; what torch would load is not opened."""
    for path, outputs in ((onnx_artifact, ["tokens", "pooled"]), (torch_artifact, [])):
        report = tokopt.verify(path)
        assert report.ok and not report.faults
        assert [check.name for check in report.outputs.get("forward", ())] == outputs
        assert json.loads(json.dumps(report.as_dict()))["ok"] is True


def test_verify_reports_every_damaged_file_and_runs_nothing(copy: Path) -> None:
    with (copy / "weights.data").open("r+b") as stream:
        stream.write(b"\xff")
    (copy / "selftest.safetensors").unlink()
    report = tokopt.verify(copy)
    assert not report.ok and not report.outputs and len(report.faults) == 2
    assert "weights.data is damaged" in report.faults[1] and "missing" in report.faults[0]
    assert report.as_dict()["ok"] is False


def test_verify_reports_wrong_numbers(copy: Path) -> None:
    path = copy / "selftest.safetensors"
    tensors = load_file(path)
    tensors["forward/outputs/pooled"] = tensors["forward/outputs/pooled"] * np.float32(1.1)
    path.write_bytes(save(tensors))
    rehash(copy)
    report = tokopt.verify(copy)
    assert [check.ok for check in report.outputs["forward"]] == [True, False] and not report.ok


def test_verify_needs_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no tokopt artifact"):
        tokopt.verify(tmp_path)


def test_damaged_torch_artifact(torch_artifact: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(torch_artifact, tmp_path / "copy.tokopt"))
    (path / "forward.pt2").write_bytes(b"no archive")
    with pytest.raises(ArtifactError, match=r"forward.pt2 has 10 bytes"):
        tokopt.open_bundle(path)


def test_unknown_target(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no target 'onxx'; choose among onnx, torch"):
        tokopt.export(vision(), tmp_path / "a.tokopt", target="onxx")


def test_place_must_be_free(copy: Path, tmp_path: Path) -> None:
    before = (copy / "manifest.json").read_bytes()
    with pytest.raises(ArtifactError, match="exists already; pass overwrite=True"):
        tokopt.export(vision(), copy, target="torch")
    assert (copy / "manifest.json").read_bytes() == before
    with pytest.raises(ArtifactError, match="does not exist; create it first"):
        tokopt.export(vision(), tmp_path / "no" / "a.tokopt", target="torch")
    assert not (tmp_path / "no").exists()


def test_only_artifacts_are_overwritten(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(precious)
    for path in (precious, precious / "thesis.txt", tmp_path / "link"):
        with pytest.raises(ArtifactError, match="will not be overwritten"):
            tokopt.export(vision(), path, target="torch", overwrite=True)
    assert (precious / "thesis.txt").read_text() == "mine"


def test_overwrite_replaces_the_whole_artifact(copy: Path) -> None:
    tokopt.export(vision(), copy, target="torch", overwrite=True)
    files = {p.name for p in copy.iterdir()}
    assert files == {"manifest.json", "forward.pt2", "selftest.safetensors", "outline.json"}
    assert os.listdir(copy.parent) == [copy.name]


@pytest.mark.parametrize("failure", [LoweringError("no"), KeyboardInterrupt(), OSError("disk full")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_leaves_nothing_behind(
    failure: BaseException,
    overwrite: bool,
    onnx_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It strikes at the latest moment: everything is written, the comparison fails."""

    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    path = tmp_path / "a.tokopt"
    if overwrite:
        shutil.copytree(onnx_artifact, path)
    monkeypatch.setattr(tokopt.lower.onnx.export, "check_parity", fail)
    with pytest.raises(ArtifactError if isinstance(failure, OSError) else type(failure)):
        tokopt.export(vision(), path, overwrite=overwrite)
    assert os.listdir(tmp_path) == (["a.tokopt"] if overwrite else [])
    if overwrite:
        assert tokopt.verify(path).ok  # still the old one


def test_failing_rename_puts_the_old_artifact_back(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if source.suffix == ".tmp":
            raise OSError("disk gone")
        rename(source, target)

    monkeypatch.setattr(tokopt.place, "_renameat2", lambda *arguments: False)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(ArtifactError, match=r"cannot be written.*disk gone"):
        tokopt.export(vision(), copy, target="torch", overwrite=True)
    assert os.listdir(copy.parent) == [copy.name] and tokopt.verify(copy).ok


def test_relative_path_and_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    assert tokopt.export(vision(), "a.tokopt", target="torch", progress=lines.append) == Path("a.tokopt")
    assert tokopt.verify("a.tokopt").ok and "saving forward.pt2" in lines


WITHOUT_TORCH = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnxscript", "transformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import numpy as np
from safetensors.numpy import load_file
path = sys.argv[1]
test = load_file(f"{path}/selftest.safetensors")
"""

RUNTIME = """
from tokopt.runtime import load
import tokopt
model = load(path, threads=1)
assert all(check.ok for check in model.selftest())
assert model(test["forward/inputs/patches"]).pooled.shape == (3, 32)
assert tokopt.verify(path).ok
assert "torch" not in sys.modules
"""

BARE = """
import onnxruntime
session = onnxruntime.InferenceSession(f"{path}/forward.onnx", providers=["CPUExecutionProvider"])
tokens, pooled = session.run(["tokens", "pooled"], {"patches": test["forward/inputs/patches"]})
np.testing.assert_allclose(tokens, test["forward/outputs/tokens"], rtol=1e-4, atol=1e-5)
np.testing.assert_allclose(pooled, test["forward/outputs/pooled"], rtol=1e-4, atol=1e-5)
assert not {"torch", "tokopt"} & set(sys.modules)
"""


@pytest.mark.parametrize("code", [RUNTIME, BARE], ids=["runtime", "bare"])
def test_runs_where_torch_is_not_installed(onnx_artifact: Path, code: str) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH + code, str(onnx_artifact)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
