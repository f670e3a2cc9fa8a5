"""A model of a Triton repository: its configuration says what the manifest says, and its files are enough to serve it.

No server runs here: ``tests/lower/triton_server.py`` does what one does, with the written files alone.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokopt
from tests.lower.encoders import text, vision
from tests.lower.triton_server import Arrays, Server, read_config, schema
from tests.matrix.language import artifact, bundle, prompt
from tests.runtime.artifacts import sealed
from tests.zoo.decoders import CONTEXT, VOCABULARY
from tokopt.errors import ArtifactError, InputError, LoweringError, MissingDependencyError, TokoptError
from tokopt.lower.triton.model import IDLE_SECONDS, Serving, write_model
from tokopt.runtime import load
from tokopt.runtime.format.manifest import (
    EngineEntry,
    Manifest,
    Profile,
    Tensor,
    describe_file,
    parse_manifest,
    read_manifest,
)
from tokopt.runtime.format.state import State

SLOTS = 40


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a merged encoder."""
    merged = tokopt.optimize(vision(), "tome{r=3}")
    return tokopt.export(merged, tmp_path_factory.mktemp("artifacts") / "merged.tokopt")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a language model in a repository."""
    path = tmp_path_factory.mktemp("models") / "llama"
    return write_model(artifact("llama").path, path, Serving(max_batch=3, slots=SLOTS))


def changed(artifact: Path, folder: Path, change: Callable[[Manifest], Manifest]) -> Path:
    """A copy of an artifact with another manifest."""
    copy = Path(shutil.copytree(artifact, folder / "changed.tokopt"))
    (copy / "manifest.json").write_text(change(read_manifest(copy)).to_json())
    return copy


# ------------------------------------------------------------------------------------------- encoders


def test_an_encoder_is_served_from_its_folder_alone(encoder: Path, tmp_path: Path) -> None:
    """Requests of several clients in one batch get the features of the artifact; the artifact itself is gone."""
    copy = Path(shutil.copytree(encoder, tmp_path / "copy.tokopt"))
    server = Server(write_model(copy, tmp_path / "vit"))
    shutil.rmtree(copy)
    rng = np.random.default_rng(0)
    requests = [{"patches": rng.normal(size=(n, 20, 12)).astype(np.float32)} for n in (1, 3, 2)]
    expected = load(encoder, threads=1)
    for request, answer in zip(requests, server.infer(requests), strict=True):
        for name, value in expected(**request).items():
            np.testing.assert_allclose(answer[name], value, atol=1e-5)


def test_configuration_of_an_encoder_is_its_signature(encoder: Path, tmp_path: Path) -> None:
    path = write_model(encoder, tmp_path / "vit")
    config, program = read_config(path), read_manifest(encoder).programs["forward"]
    assert (config.name, config.backend, config.max_batch_size) == ("vit", "onnxruntime", Serving().max_batch)
    assert config.HasField("dynamic_batching") and not config.HasField("sequence_batching")
    for messages, tensors in ((config.input, program.inputs), (config.output, program.outputs)):
        assert [(m.name, ("batch", *m.dims)) for m in messages] == [(t.name, t.axes) for t in tensors]
        assert {schema.DataType.Name(m.data_type) for m in messages} == {"TYPE_FP32"}
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, group.KIND_CPU)
    assert not config.parameters
    assert {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()} == {
        "config.pbtxt",
        "1/model.onnx",
        "1/weights.data",
    }
    assert (path / "1" / "model.onnx").read_bytes() == (encoder / "forward.onnx").read_bytes()


def test_options(encoder: Path, tmp_path: Path) -> None:
    serving = Serving(max_batch=32, instances=4, gpu=True, threads=2)
    config = read_config(write_model(encoder, tmp_path / "vit", serving))
    (group,) = config.instance_group
    assert (config.max_batch_size, group.count, group.kind) == (32, 4, group.KIND_GPU)
    assert config.parameters["intra_op_thread_count"].string_value == "2"


def test_bundle_is_exported_on_the_way(tmp_path: Path) -> None:
    """Axes with a name, other than the batch, are of any size."""
    server = Server(write_model(text(), tmp_path / "text"))
    assert [list(message.dims) for message in server.config.input] == [[-1], [-1]]
    ids, mask = np.arange(14).reshape(2, 7), np.ones((2, 7), np.int64)
    (answer,) = server.infer([{"input_ids": ids, "attention_mask": mask}])
    want = text()(torch.from_numpy(ids), torch.from_numpy(mask))[0]
    np.testing.assert_allclose(next(iter(answer.values())), want.numpy(), atol=1e-5)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["text"]
    assert sorted(f.name for f in (tmp_path / "text").iterdir()) == ["1", "config.pbtxt"]


class Score(torch.nn.Module):
    """One number per row, or one for all."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.layer, self.whole = torch.nn.Linear(12, 1), whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).mean() if self.whole else self.layer(x).mean((1, 2))


def test_a_number_per_row_is_reshaped(tmp_path: Path) -> None:
    scores = tokopt.capture(Score(whole=False), (torch.randn(3, 5, 12),))
    server = Server(write_model(scores, tmp_path / "score"))
    (output,) = server.config.output
    assert list(output.dims) == [1] and list(output.reshape.shape) == [] and output.HasField("reshape")
    x = np.ones((2, 5, 12), np.float32)
    (answer,) = server.infer([{server.config.input[0].name: x}])
    np.testing.assert_allclose(answer[output.name], scores(torch.from_numpy(x))[0].numpy(), atol=1e-6)


@pytest.mark.parametrize("whole", [True, False])
def test_what_has_no_batch_is_not_batched(tmp_path: Path, whole: bool) -> None:
    """Shapes are whole then: a fixed batch is an axis like others, and a number has one axis of one."""
    dynamic = None if whole else {}
    fixed = tokopt.capture(Score(whole), (torch.randn(3, 5, 12),), dynamic=dynamic)
    config = read_config(write_model(fixed, tmp_path / "score"))
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [-1 if whole else 3, 5, 12]
    assert list(config.output[0].dims) == [1 if whole else 3]


def test_batch_stays_in_its_range(tmp_path: Path) -> None:
    ranges = {"batch": tokopt.AxisRange(1, 4)}
    scores = tokopt.capture(Score(whole=False), (torch.randn(3, 5, 12),), ranges=ranges)
    assert read_config(write_model(scores, tmp_path / "score")).max_batch_size == 4


@pytest.mark.parametrize(("builder", "served"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "onnxruntime")])
def test_an_engine_is_served_on_gpus(encoder: Path, tmp_path: Path, builder: str, served: str) -> None:
    """A second form beside the ONNX file: its backend, its name, its batch, and nothing of the ONNX form."""

    def build(manifest: Manifest) -> Manifest:
        (tmp_path / "changed.tokopt" / "forward.engine").write_bytes(b"an engine")
        entry = describe_file(tmp_path / "changed.tokopt" / "forward.engine")
        program = manifest.programs["forward"]
        engine = EngineEntry(builder, "1.0", "sm_80", {"batch": Profile(1, 2, 4)})
        program = replace(program, files={**program.files, "tensorrt": "forward.engine"}, engine=engine)
        files = {**manifest.files, "forward.engine": entry}
        return replace(manifest, programs={"forward": program}, files=files)

    both = changed(encoder, tmp_path, build)
    path = write_model(both, tmp_path / "gpu", Serving(gpu=True))
    config, files = read_config(path), {f.name: f.read_bytes() for f in (path / "1").iterdir()}
    assert config.backend == served
    assert config.max_batch_size == (4 if served == "tensorrt" else Serving().max_batch)
    assert ("model.onnx" in files) == (served == "onnxruntime")
    assert files.get("model.plan") == (b"an engine" if served == "tensorrt" else None)
    assert read_config(write_model(both, tmp_path / "cpu")).backend == "onnxruntime"


# ------------------------------------------------------------------------------------ language models


def request(tokens: list[int], start: int) -> Arrays:
    """New tokens of one sequence, after ``start`` others."""
    count = len(tokens)
    return {
        "tokens": np.array([tokens]),
        "positions": np.arange(start, start + count)[None],
        "mask": np.tril(np.ones((1, count, count), bool)),
    }


def greedy(server: Server, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Tokens of several sequences: every prompt alone, then all steps in one batch."""
    sequences = [server.start() for _ in prompts]
    answers = [server.infer([request(p, 0)], [s])[0] for p, s in zip(prompts, sequences, strict=True)]
    new = [[int(answer["logits"].argmax())] for answer in answers]
    for _ in range(count - 1):
        steps = [request(n[-1:], len(p) + len(n) - 1) for p, n in zip(prompts, new, strict=True)]
        for tokens, answer in zip(new, server.infer(steps, sequences), strict=True):
            tokens.append(int(answer["logits"].argmax()))
    return new


@pytest.mark.parametrize("name", ["llama", "hand_written"])
def test_sequences_in_one_batch_say_what_the_runtime_says(name: str, tmp_path: Path) -> None:
    """Sequences of unequal length, each as if it were alone, from the folder's files alone."""
    model = artifact(name)
    server = Server(write_model(model.path, tmp_path / name, Serving(max_batch=3, slots=SLOTS)))
    prompts = [prompt(n, seed=n) for n in (3, 17, 8)]
    got = greedy(server, prompts, 20)
    assert got == [list(model.generate(p, max_tokens=20).tokens) for p in prompts]
    assert len({token for row in got for token in row}) > 2


def test_configuration_of_a_language_model_is_its_wiring(decoder: Path) -> None:
    config, manifest = read_config(decoder), artifact("llama").manifest
    batching = config.sequence_batching
    assert (config.max_batch_size, batching.oldest.max_candidate_sequences) == (3, 3)
    assert batching.max_sequence_idle_microseconds == IDLE_SECONDS * 10**6
    assert not config.HasField("dynamic_batching")
    assert [(m.name, list(m.dims)) for m in config.input] == [
        ("tokens", [-1]),
        ("positions", [-1]),
        ("mask", [-1, -1]),
    ]
    assert [(m.name, list(m.dims)) for m in config.output] == [("logits", [1, VOCABULARY])]
    assert len(batching.state) == len(manifest.states) == 6
    program = manifest.programs["step"]
    reads = {tensor.state: tensor.name for tensor in program.inputs}
    writes = {tensor.state: tensor.name for tensor in program.outputs}
    for message, state in zip(batching.state, manifest.states, strict=True):
        assert (message.input_name, message.output_name) == (reads[state.name], writes[state.name])
        assert list(message.dims) == ([SLOTS if a == "slots" else a for a in state.axes[1:]] or [1])
        assert (
            schema.DataType.Name(message.data_type)
            == {
                "int64": "TYPE_INT64",
                "float32": "TYPE_FP32",
            }[state.dtype]
        )
        assert message.use_same_buffer_for_input_output == (writes[state.name] in program.aliases)
        assert message.initial_state[0].zero_data == (state.initial == 0)


def test_states_begin_as_the_manifest_says(decoder: Path) -> None:
    start = Server(decoder).start()
    for state in artifact("llama").manifest.states:
        assert (start[state.name] == state.initial).all() and start[state.name].dtype == state.dtype
    assert (start["slots"] == -1).all() and start["slots"].shape == (1, 1, SLOTS, 1)


def test_slots_are_the_context_unless_told(tmp_path: Path) -> None:
    config = read_config(write_model(artifact("llama").path, tmp_path / "llama"))
    sizes = {state.input_name: list(state.dims) for state in config.sequence_batching.state}
    assert sizes["slots"] == [1, CONTEXT, 1] and sizes["key_1"] == [2, CONTEXT, 16]


def test_a_sequence_that_outgrows_its_slots_fails(decoder: Path) -> None:
    server = Server(decoder)
    sequence = server.start()
    server.infer([request(prompt(SLOTS), 0)], [sequence])
    with pytest.raises(Exception, match="TensorScatter"):
        server.infer([request([1], SLOTS)], [sequence])


# ------------------------------------------------------------------------------------------- refusals


def refusal(source: tokopt.Bundle | Path, folder: Path, serving: Serving | None = None) -> TokoptError:
    """The error of a model that must be refused, with nothing left behind."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(TokoptError) as raised:
        write_model(source, folder / "model", serving)
    assert sorted(folder.rglob("*")) == before
    assert "\n" not in str(raised.value)
    return raised.value


def test_a_second_program_is_refused(tmp_path: Path) -> None:
    """As eviction adds it: Triton would never call ``compact``. The tests of the command evict in earnest."""

    def evict(manifest: Manifest) -> Manifest:
        return replace(
            manifest, programs={**manifest.programs, "compact": manifest.programs["step"]}, pipeline="h2o"
        )

    error = refusal(changed(artifact("llama").path, tmp_path, evict), tmp_path)
    assert isinstance(error, LoweringError)
    assert "the programs step, compact of" in str(
        error
    ) and "leave out the pass that added them (h2o)" in str(error)


def test_states_that_would_be_mixed_up_are_refused(tmp_path: Path) -> None:
    def rename(manifest: Manifest) -> Manifest:
        doc = json.loads(manifest.to_json().replace('"next_length"', '"z_length"'))
        return parse_manifest(json.dumps(sealed(doc)).encode())

    error = refusal(changed(artifact("llama").path, tmp_path, rename), tmp_path)
    assert isinstance(error, LoweringError) and "Triton pairs the two by that order" in str(error)


def test_state_without_a_batch_in_front_is_refused(tmp_path: Path) -> None:
    def share(manifest: Manifest) -> Manifest:
        turn = State("turn", "counter", "int64", (2,))
        given, made = (Tensor(name, "int64", (2,), "state", "turn") for name in ("turn", "next_turn"))
        step = manifest.programs["step"]
        counting = replace(step, inputs=(*step.inputs, given), outputs=(*step.outputs, made))
        return replace(manifest, programs={"step": counting}, states=(*manifest.states, turn))

    error = refusal(changed(artifact("llama").path, tmp_path, share), tmp_path)
    assert isinstance(error, LoweringError) and "without a batch in front" in str(error)


def test_torch_artifact_is_refused(tmp_path: Path) -> None:
    made = tokopt.export(vision(), tmp_path / "torch.tokopt", target="torch")
    error = refusal(made, tmp_path)
    assert isinstance(error, LoweringError) and "as torch only; export it with target='onnx'" in str(error)


def test_damaged_artifact_is_refused(encoder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(encoder, tmp_path / "copy.tokopt"))
    with (copy / "weights.data").open("r+b") as stream:
        stream.write(b"damage")
    assert isinstance(refusal(copy, tmp_path), ArtifactError)


def test_slots_of_an_encoder_are_refused(encoder: Path, tmp_path: Path) -> None:
    error = refusal(encoder, tmp_path, Serving(slots=5))
    assert isinstance(error, InputError) and "no language model" in str(error)


def test_place_that_is_taken_is_kept(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert isinstance(refusal(encoder, tmp_path), ArtifactError)


@pytest.mark.parametrize("name", ["max_batch", "instances", "threads", "slots"])
def test_numbers_below_one_are_refused(name: str) -> None:
    settings: dict[str, Any] = {name: 0}
    with pytest.raises(InputError, match=f"{name} is 0"):
        Serving(**settings)


def test_missing_package_is_named_before_anything_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    error = refusal(bundle("llama"), tmp_path)
    assert isinstance(error, MissingDependencyError) and "tokopt[triton]" in str(error)
