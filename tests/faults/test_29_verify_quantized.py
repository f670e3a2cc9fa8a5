"""``verify`` condemned every quantized artifact: engines round activations to 8 bits, and what was stored did not.

The law: export runs the check that verify will run and writes nothing that fails it; what another processor rounds
differently is no damage; a wrong number in the weights is, on every processor; and an engine that computes something
else is named as such.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import tokopt
from tests.matrix.language import artifact
from tests.matrix.test_matrix import captured
from tests.runtime.artifacts import rehash
from tokopt.cli import main
from tokopt.errors import LoweringError
from tokopt.ir.bundle import Bundle
from tokopt.runtime import load
from tokopt.runtime.engines.onnxruntime import Sessions
from tokopt.runtime.format.manifest import read_manifest
from tokopt.runtime.selftest import read_selftest

Arrays = Mapping[str, np.ndarray]


@cache
def vit(pipeline: str) -> Bundle:
    return tokopt.optimize(captured("vit"), pipeline)


@cache
def language() -> Path:
    return artifact("llama", "rtn").path


@cache
def merged() -> Path:
    return tokopt.export(vit("tome{r=4},rtn{group=16}"), Path(mkdtemp()) / "vit.tokopt")


@pytest.fixture
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.param(), tmp_path / "copy.tokopt"))


EVERY = pytest.mark.parametrize("copy", [language, merged], indirect=True, ids=["llama", "vit"])


def as_other_machine(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let ONNX Runtime's own arithmetic be that of a processor with other kernels; in float32 nothing changes."""
    run = Sessions.run

    def other(self: Sessions, program: str, feed: Arrays, form: str | None = None) -> dict[str, np.ndarray]:
        if not self.rounds:
            return run(self, program, feed, form)
        if name == "rounds nothing":
            return run(self.in_float(), program, feed, form)
        if name == "rounds otherwise":
            generator = np.random.default_rng(0)
            noisy = {
                key: x + (2e-3 * generator.standard_normal(x.shape)).astype(x.dtype)
                if x.dtype == np.float32
                else x
                for key, x in feed.items()
            }
            return run(self, program, noisy, form)
        assert name == "saturates"
        found = run(self, program, feed, form)
        return {key: np.clip(x, -0.1, 0.1) if x.dtype == np.float32 else x for key, x in found.items()}

    monkeypatch.setattr(Sessions, "run", other)


def spoil_one_scale(folder: Path) -> None:
    """Let one output channel of one quantized weight be half as large again in every form."""
    portable, *others = sorted(folder.glob("*.onnx"), key=lambda path: path.name.count("."))
    name = scale_of(onnx.load(portable, load_external_data=False).graph)
    for path in (portable, *others):
        model = onnx.load(path, load_external_data=False)
        (scale,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        if scale.data_location != onnx.TensorProto.EXTERNAL:
            array = numpy_helper.to_array(scale).copy()
            array[3] *= 1.5
            scale.CopyFrom(numpy_helper.from_array(array, scale.name))
            path.write_bytes(model.SerializeToString())
        elif path == portable:  # forms share their weights
            place = {entry.key: entry.value for entry in scale.external_data}
            dtype = onnx.helper.tensor_dtype_to_np_dtype(scale.data_type)
            whole = np.memmap(
                folder / place["location"], dtype, "r+", int(place["offset"]), tuple(scale.dims)
            )
            whole[3] *= 1.5
            whole.flush()
    rehash(folder)


def scale_of(graph: onnx.GraphProto) -> str:
    """The name of the second weight's scales as they are stored, [out] or [out, blocks]."""
    held = {tensor.name for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    name = [node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"][1]
    while name not in held:
        name = makers[name].input[0]
    return name


@EVERY
def test_what_export_writes_is_verified_in_one_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "verified; rounding activations to 8 bits costs" in line


@EVERY
@pytest.mark.parametrize("machine", ["rounds nothing", "rounds otherwise"])
def test_another_machine_condemns_nothing(copy: Path, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_other_machine(monkeypatch, machine)
    assert tokopt.verify(copy).ok


@EVERY
@pytest.mark.parametrize("machine", ["", "rounds nothing", "rounds otherwise"])
def test_one_wrong_scale_is_found_everywhere(
    copy: Path, machine: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_one_scale(copy)
    if machine:
        as_other_machine(monkeypatch, machine)
    assert main(["verify", str(copy)]) == 1
    header, *rows, verdict = capsys.readouterr().out.splitlines()
    report = tokopt.verify(copy)
    wrong = [check.name for found in report.outputs.values() for check in found if not check.ok]
    assert header.split()[:2] == ["program", "output"] and len(rows) >= len(wrong) > 0
    assert "NOT as it was written" in verdict and not report.faults


@EVERY
def test_an_engine_that_computes_something_else_is_named(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_other_machine(monkeypatch, "saturates")
    assert main(["verify", str(copy)]) == 1
    assert "as it was written, but ONNX Runtime computes something else" in capsys.readouterr().out


def test_export_writes_nothing_that_verify_would_condemn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_other_machine(monkeypatch, "saturates")
    with pytest.raises(LoweringError, match=r"output 'last_hidden_state' of program 'forward' is too far"):
        tokopt.export(vit("rtn{group=16}"), tmp_path / "vit.tokopt")
    assert not list(tmp_path.iterdir())


def test_a_language_model_is_tested_on_text_that_it_would_write() -> None:
    """The first new token of each row is likely after what is cached, where random tokens would not be."""
    model = load(language(), threads=1)
    test = read_selftest(language(), read_manifest(language()), "step")
    tokens, logits = test.inputs["tokens"], test.outputs["logits"]
    assert tokens.shape == (2, 4) and test.inputs["positions"].tolist() == [
        [15, 16, 17, 18],
        [16, 17, 18, 19],
    ]
    cached = test.inputs["slots"][1, 0, :, 0]
    assert cached[:16].tolist() == list(range(16)) and (cached[16:] == -1).all()
    drawn = model.generate([1], max_tokens=39, sampling=None)
    assert len(drawn.tokens) == 39 and np.isfinite(logits).all()
