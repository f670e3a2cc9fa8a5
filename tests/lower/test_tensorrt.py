"""Engines: what passes make builds for a GPU that is not here, or is refused with its reason.

The graph that TensorRT gets is run by ONNX Runtime and compared with the portable one (``check=True``); the engine
itself is not executed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoModelForCausalLM

import tokopt
from examples.data import smollm2
from tests.lower.encoders import text, vision
from tests.matrix import language
from tests.matrix.test_matrix import captured
from tests.matrix.test_quantize import samples
from tokopt import EngineOptions
from tokopt.errors import ArtifactError, InputError, LoweringError, MissingDependencyError
from tokopt.lower.tensorrt.engine import EngineBuilder
from tokopt.lower.tensorrt.profiles import choose_profiles, parse_profiles
from tokopt.runtime import load
from tokopt.runtime.engines.tensorrt import MODULES, DeviceBuffers, Installed, check_engine, narrowed
from tokopt.runtime.format.manifest import EngineEntry, Profile, read_manifest
from tokopt.runtime.format.signature import BATCH, Range
from tokopt.runtime.format.state import Occupancy, State

AMPERE = EngineOptions("sm_86")

EVICTION = "budget=12 sinks=2 recent=4 every=3"


@pytest.fixture(scope="module")
def merged() -> tokopt.Bundle:
    return tokopt.optimize(vision(), "tome{r=3}")


@pytest.fixture(scope="module")
def artifact(merged: tokopt.Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "vit.tokopt"
    options = EngineOptions("sm_86", ("batch=1:4:16",), workspace=1)
    return tokopt.export(merged, path, target="tensorrt", engine=options)


# --- what builds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "swin", "modernbert"])
def test_models_build(name: str, tmp_path: Path) -> None:
    """One of every kind; ``tests/matrix/test_backends.py`` builds every architecture, merged."""
    tokopt.export(captured(name), tmp_path / "model.tokopt", target="tensorrt", engine=AMPERE)


@pytest.mark.parametrize(
    "pipeline",
    [
        "tome{r=4},int8{activations=static}",
        "int8",
        "rtn{group=16}",
        "rtn{bits=8 group=16}",
        "rtn{group=16 symmetric=true}",
        "cast{dtype=float16}",
    ],
)
def test_quantized_models_build(pipeline: str, tmp_path: Path) -> None:
    bundle = tokopt.optimize(vision(), pipeline, calibration=[vision().main.example])
    tokopt.export(bundle, tmp_path / "model.tokopt", target="tensorrt", engine=AMPERE)


@pytest.mark.parametrize("pipeline", ["tome{r=4},fp8{activations=static}", "fp8"])
def test_models_in_8_bit_floats_build_where_there_are_any(pipeline: str, tmp_path: Path) -> None:
    bundle = tokopt.optimize(vision(), pipeline, calibration=[vision().main.example])
    ada = EngineOptions("sm_89")
    path = tokopt.export(bundle, tmp_path / "model.tokopt", target="tensorrt", engine=ada)
    assert (path / "forward.sm_89.engine").stat().st_size > 10_000
    with pytest.raises(
        LoweringError, match=r"float8\S* .*sm_86 does not multiply \(sm_89 and later do\); use int8"
    ):
        tokopt.export(bundle, tmp_path / "other.tokopt", target="tensorrt", engine=AMPERE)


def test_factors_of_any_sign_move_into_8_bit_floats(tmp_path: Path) -> None:
    """TensorRT takes no negative step, nor one of 0: the numbers take the signs. ``check`` compares the graphs."""
    bundle = tokopt.optimize(tokopt.capture(Factors(), (torch.randn(3, 5, 16),)), "fp8")
    lines: list[str] = []
    path = tmp_path / "model.tokopt"
    tokopt.export(bundle, path, target="tensorrt", engine=EngineOptions("sm_89"), progress=lines.append)
    model = onnx.load(path / "forward.onnx")
    scales = [numpy_helper.to_array(one) for one in model.graph.initializer if one.dims == [16]]
    assert any((scale < 0).any() and (scale == 0).any() for scale in scales)


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("gpt2", f"streaming{{{EVICTION}}}"),
        ("llama", "kivi{group=8 every=32}"),
        ("llama", f"h2o{{{EVICTION}}},int8_kv"),
    ],
)
def test_language_models_build(name: str, pipeline: str, tmp_path: Path) -> None:
    """Step and compact, with a cache of a fixed number of slots that is written in place."""
    bundle = tokopt.optimize(language.bundle(name), pipeline, calibration=samples(name))
    options = EngineOptions("sm_89", ("slots=64", "tokens=1:1:16"))
    path = tokopt.export(bundle, tmp_path / "model.tokopt", target="tensorrt", engine=options)
    manifest = read_manifest(path)
    assert {"step.sm_89.engine", "compact.sm_89.engine"} <= set(manifest.files)
    engine = manifest.programs["step"].engine
    assert engine is not None
    assert engine.profiles["slots"] == Profile(64, 64, 64) and engine.profiles["tokens"] == Profile(1, 1, 16)


def test_smollm2_builds_with_eviction(tmp_path: Path) -> None:
    """The real weights, of the first two layers: the others are like them, and take a minute more.

    That the portable form computes what the program does is asked of smaller models.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    bundle = tokopt.optimize(tokopt.capture_lm(model.eval().requires_grad_(False)), "h2o{budget=256}")
    options = EngineOptions("sm_89", ("slots=512", "tokens=1:1:64"))
    path = tokopt.export(bundle, tmp_path / "a.tokopt", target="tensorrt", engine=options, check=False)
    assert (path / "step.sm_89.engine").stat().st_size > 4 * 49152 * 576  # the embedding alone


def test_a_loop_is_refused_with_its_place(tmp_path: Path) -> None:
    bundle = tokopt.optimize(vision(), "divprune{keep=0.7}")
    with pytest.raises(
        LoweringError,
        match=r"farthest_point.* at model\.blocks\.0 is a Loop, .*crashes; run the portable ONNX",
    ):
        tokopt.export(bundle, tmp_path / "model.tokopt", target="tensorrt", engine=AMPERE)
    assert not list(tmp_path.iterdir())


class Factors(torch.nn.Module):
    """A linear layer without a bias, times a factor per channel: some negative, one 0."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 16, bias=False)
        self.factor = torch.nn.Parameter(torch.arange(16.0) - 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x) * self.factor


class Scatter(torch.nn.Module):
    """A sum at places that come several times."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.scaled_dot_product_attention(x, x, x)[:, 0, :, 0]
        return y.scatter_add(1, torch.zeros(x.shape[0], 5, dtype=torch.int64), y[:, :5])


def test_what_the_parser_cannot_read_is_named(tmp_path: Path) -> None:
    bundle = tokopt.capture(Scatter(), (torch.randn(3, 2, 6, 8),))
    with pytest.raises(
        LoweringError,
        match=r"refuses program 'forward': ScatterElements of aten.scatter_add.* at model cannot be read \(",
    ):
        tokopt.export(bundle, tmp_path / "model.tokopt", target="tensorrt", engine=AMPERE)


# --- profiles ---------------------------------------------------------------------------------------------


def test_profiles_are_spelled_by_axis() -> None:
    assert parse_profiles(["batch=1:8:32", "slots=1024"]) == {
        "batch": Profile(1, 8, 32),
        "slots": Profile(1024, 1024, 1024),
    }
    assert [str(Profile(1, 8, 32)), str(Profile(7, 7, 7))] == ["1:8:32", "7"]


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        (["batch"], "is no profile; write axis=min:opt:max"),
        (["batch=1:2"], "is no profile"),
        (["batch=8:1:32"], "not in order"),
        (["batch=0:1:2"], "not in order"),
        (["batch=1:2:3", "batch=2"], "given twice"),
    ],
)
def test_profiles_that_mean_nothing(profiles: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EngineOptions(profiles=profiles)


def test_profiles_follow_from_ranges_and_example() -> None:
    assert choose_profiles(text(), {})["forward"] == {
        "batch": Profile(1, 3, 32),
        "tokens": Profile(1, 11, 64),
    }
    step = choose_profiles(language.bundle("llama"), {})["step"]
    assert step["tokens"] == Profile(1, 1, 256) and step["slots"] == Profile(320, 320, 320)
    few = choose_profiles(language.bundle("llama"), parse_profiles(["slots=32"]))["step"]
    assert few["tokens"].max == 32  # no more tokens come at once than there are slots


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("tokens=1:8:65", "the profile tokens=1:8:65 leaves the sizes that the program takes, from 1 to 64"),
        ("slots=8", "no axis 'slots' to give a profile; the model has batch, tokens"),
    ],
)
def test_profiles_that_do_not_fit(profile: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_profiles(text(), parse_profiles([profile]))


# --- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "86"}, "'86' is no compute capability"),
        ({"workspace": 0}, r"workspace is 0 .*a finite number of GiB above 0"),
    ],
)
def test_options_that_mean_nothing(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EngineOptions(**options)


def test_options_that_the_builder_has_not(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="builds no engines for sm_70, only for sm_75, sm_80, sm_86"):
        tokopt.export(vision(), tmp_path / "a", target="tensorrt", engine=EngineOptions("sm_70"))
    with pytest.raises(InputError, match="measures nothing while it builds"):
        options = EngineOptions("sm_86", timing_cache=tmp_path / "cache")
        tokopt.export(vision(), tmp_path / "a", target="tensorrt", engine=options)
    with pytest.raises(InputError, match="mean nothing to the target 'onnx'"):
        tokopt.export(vision(), tmp_path / "a", engine=AMPERE)
    assert not list(tmp_path.iterdir())


# --- the artifact -----------------------------------------------------------------------------------------


def test_manifest_describes_the_engine(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    import tensorrt_rtx

    version = tensorrt_rtx.__version__
    assert manifest.programs["forward"].engine == EngineEntry(
        "tensorrt-rtx", version, "sm_86", {"batch": Profile(1, 4, 16)}
    )
    assert manifest.programs["forward"].files["tensorrt"] == "forward.sm_86.engine"
    assert {path.name for path in artifact.iterdir()} == {"manifest.json", *manifest.files}


def test_portable_form_is_that_of_target_onnx(artifact: Path, merged: tokopt.Bundle, tmp_path: Path) -> None:
    plain = tokopt.export(merged, tmp_path / "plain.tokopt")
    assert (plain / "forward.onnx").read_bytes() == (artifact / "forward.onnx").read_bytes()
    example = [tensor.numpy() for tensor in merged.main.example]
    for one, other in zip(load(plain)(*example).values(), load(artifact)(*example).values(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert tokopt.verify(artifact).ok


def test_damage_of_an_engine_is_found(artifact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy.tokopt"))
    with (copy / "forward.sm_86.engine").open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"damage")
    with pytest.raises(ArtifactError, match=r"forward\.sm_86\.engine is damaged"):
        load(copy)
    assert not tokopt.verify(copy).ok


# --- the runtime, as far as there is no GPU ---------------------------------------------------------------


def test_engines_run_where_they_were_built_for(artifact: Path) -> None:
    engine = read_manifest(artifact).programs["forward"].engine
    assert engine is not None
    check_engine(artifact, "forward", engine, Installed(engine.builder, engine.version, "sm_86"))
    for found in (
        Installed("tensorrt", engine.version, "sm_86"),
        Installed(engine.builder, "1.0.0", "sm_86"),
        Installed(engine.builder, engine.version, "sm_89"),
    ):
        with pytest.raises(ArtifactError) as error:
            check_engine(artifact, "forward", engine, found)
        assert f"needs tensorrt-rtx {engine.version} on sm_86" in str(error.value)
        assert f"here is {found.builder} {found.version} on {found.arch}" in str(error.value)
        assert f"tokopt export MODEL -o {artifact} --target tensorrt --arch {found.arch}" in str(error.value)


def test_sizes_are_those_of_the_profiles(artifact: Path) -> None:
    ranges = narrowed(artifact, read_manifest(artifact)).programs["forward"].ranges
    assert (ranges["batch"].min, ranges["batch"].max) == (1, 16)


class HostBuffers(DeviceBuffers):
    """The states of an engine in the host's memory."""

    def _free_bytes(self) -> int | None:
        return None

    def _value(self, array: np.ndarray) -> Any:
        return array


def test_a_cache_grows_up_to_the_slots_of_the_engines() -> None:
    """Free slots are there as far as the engines have them; what is needed is refused beyond."""
    states = [State("key", "key", "float32", (BATCH, 1, "slots", 2), occupancy=Occupancy("length"))]
    states.append(State("length", "length", "int64", (BATCH,)))
    buffers = HostBuffers(states, 1, 70, {"slots": Range(1, 100)})
    assert buffers.slots == {"slots": 100} and buffers.nbytes == 100 * 2 * 4 + 8
    assert buffers.roomy({"slots": 3}) == {"slots": 64} and buffers.roomy({"slots": 100}) == {"slots": 100}
    with pytest.raises(InputError, match="the text needs 101 slots and the engines have 100; export with"):
        buffers.resize(buffers.roomy({"slots": 101}))
    assert HostBuffers(states, 1, 70, {"slots": Range(1, None)}).slots == {"slots": 128}


def test_an_artifact_without_engines_is_refused(merged: tokopt.Bundle, tmp_path: Path) -> None:
    plain = tokopt.export(merged, tmp_path / "plain.tokopt")
    with pytest.raises(
        ArtifactError, match=r"has no engine; build it with: tokopt export MODEL .*--target tensorrt"
    ):
        load(plain, backend="tensorrt")


def test_options_of_other_backends_are_refused(artifact: Path) -> None:
    with pytest.raises(InputError, match="belong to the backend onnxruntime"):
        load(artifact, backend="tensorrt", threads=2)


def test_missing_tensorrt_names_the_extra(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES.values():
        monkeypatch.setitem(sys.modules, module, None)  # what import finds of a package that is not there
    for run in (lambda: load(artifact, backend="tensorrt"), lambda: EngineBuilder(vision(), AMPERE)):
        with pytest.raises(
            MissingDependencyError, match=r"install tokopt\[tensorrt-rtx\], or tokopt\[tensorrt\]"
        ):
            run()


def test_missing_gpu_is_said_without_torch(artifact: Path) -> None:
    code = (
        "import sys; from tokopt.runtime import load\n"
        f"try: load({str(artifact)!r}, backend='tensorrt')\n"
        "except Exception as error: print(type(error).__name__, error, 'torch' in sys.modules)"
    )
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=hidden
    )
    assert done.stdout.startswith("InputError there is no NVIDIA GPU that CUDA can use here")
    assert done.stdout.endswith("; load it with the default backend False\n")
