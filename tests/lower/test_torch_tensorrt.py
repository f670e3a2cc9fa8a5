"""Programs compiled by Torch-TensorRT: engines for a GPU that is not there, and what they are made of.

What an engine computes takes a GPU. Here the program that Torch-TensorRT is given is run by PyTorch on the CPU, which
``check`` does of every one, and the network that it makes of it is looked at.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tokopt
from tests.lower.encoders import CHANNELS, Block, vision
from tests.lower.without_gpu import FOLDER, torch_tensorrt
from tests.zoo import ZOO
from tokopt import EngineOptions
from tokopt.errors import ArtifactError, InputError, LoweringError, MissingDependencyError
from tokopt.ir.graph import module_path
from tokopt.lower.torch_tensorrt import build
from tokopt.runtime.engines.tensorrt import import_tensorrt
from tokopt.runtime.format.manifest import Profile, read_manifest

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"make installs Torch-TensorRT into {FOLDER}")

EVICTION = "budget=12 sinks=2 recent=4 every=3"


@cache
def captured(name: str) -> tokopt.Bundle:
    entry = ZOO[name]
    return tokopt.capture(entry.build(), (), entry.inputs(2), dynamic=entry.dynamic)


@cache
def smollm2() -> tokopt.Bundle:
    """SmolLM2's program: its shape, two layers and small sizes."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=96,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    )
    return tokopt.capture_lm(model.eval().requires_grad_(False))


def optimized(name: str, pipeline: str) -> tokopt.Bundle:
    if name == "smollm2":
        return tokopt.optimize(smollm2(), pipeline, calibration=[torch.arange(40)[None] % 60])
    bundle = captured(name)
    return tokopt.optimize(bundle, pipeline, calibration=[bundle.main.example])


# --- what is built ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pipeline", "arch"),
    [
        ("vit", "tome{r=4}", "sm_86"),
        ("dinov2", "divprune{keep=0.2},rtn{group=16}", "sm_86"),
        ("bert", "tome{r=2 layers=[0]}", "sm_86"),
        ("bert", "int8", "sm_89"),
    ],
)
def test_encoders_are_one_engine(name: str, pipeline: str, arch: str) -> None:
    """Each model, and a padded text of any length: nothing is left to PyTorch.

    Nor is the loop that the ONNX form of ``divprune`` has. ``python -m tests.lower.every_engine`` builds all pairs.
    """
    bundle = optimized(name, pipeline)
    with torch_tensorrt(arch) as built:
        compiled = tokopt.compile(bundle, engine=EngineOptions(arch, ("batch=1:4:16",), strict=True))
    assert compiled.report == ("forward: 1 engine, and nothing is left to PyTorch",)
    (engine,) = built
    assert len(engine.engine) > 10_000
    axes = bundle.main.inputs[0].axes
    assert [sizes[0] for sizes in engine.profiles["tensors_0"]] == [1, 4, 16]
    assert all(len(sizes) == len(axes) for sizes in engine.profiles["tensors_0"])


def test_language_models_are_one_engine_a_program() -> None:
    """Step and compact, with a cache of a fixed number of slots; tokens are single ones most of the time."""
    bundle = optimized("smollm2", f"h2o{{{EVICTION}}},int8_kv,rtn{{group=16}}")
    options = EngineOptions(profiles=("slots=64", "tokens=1:1:16"), strict=True)
    with torch_tensorrt("sm_86") as built:
        compiled = tokopt.compile(bundle, engine=options)
    assert len(built) == len(bundle.programs)
    assert compiled.report == tuple(
        f"{name}: 1 engine, and nothing is left to PyTorch" for name in bundle.programs
    )
    assert built[0].profiles["tensors_0"] == ((1, 1), (1, 1), (8, 16))


@pytest.mark.parametrize(("pipeline", "arch"), [("int8", "sm_86"), ("fp8", "sm_89")])
def test_products_are_of_bytes(pipeline: str, arch: str) -> None:
    """Q/DQ stands directly before every product of a quantized linear, on both sides, and the weight is of bytes."""
    bundle = optimized("vit", f"{pipeline}{{activations=static}}")
    with torch_tensorrt(arch) as built:
        tokopt.compile(bundle, engine=EngineOptions(strict=True))
    (engine,) = built
    weights = [name for name in engine.of("DEQUANTIZE") if "expand_weight" in name]
    activations = [name for name in engine.of("DEQUANTIZE") if "fake_" in name]
    assert len(weights) == bundle.history[-1].matches
    assert all(engine.readers[name] == ("MATRIX_MULTIPLY",) for name in weights)
    assert {kind for name in activations for kind in engine.readers[name]} == {"MATRIX_MULTIPLY"}
    assert sum(len(engine.readers[name]) for name in activations) == len(weights)
    assert all(engine.readers[name] == ("DEQUANTIZE",) for name in engine.of("QUANTIZE"))


class Gamma(torch.nn.Module):
    """An operator that no converter knows, between two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = Block(), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(torch.lgamma(self.before(x).abs() + 1))


def test_what_falls_back_is_named() -> None:
    bundle = tokopt.capture(Gamma().eval(), (torch.randn(3, 6, CHANNELS),))
    lines: list[str] = []
    with torch_tensorrt("sm_86"):
        compiled = tokopt.compile(bundle, progress=lines.append)
        with pytest.raises(LoweringError, match=r"PyTorch runs lgamma\.default .*; leave strict out"):
            tokopt.compile(bundle, engine=EngineOptions(strict=True))
    assert "lgamma.default" in compiled.report[0] and compiled.report[0] in lines
    conversion = compiled.programs["forward"].conversion
    assert conversion is not None and conversion.engines == 2 and list(conversion.fallback.values()) == [1]


def test_8_bit_floats_are_refused_where_there_are_none() -> None:
    bundle = tokopt.optimize(vision(), "fp8")
    with (
        torch_tensorrt("sm_86"),
        pytest.raises(LoweringError, match=r"sm_86 does not multiply .*; use int8 in"),
    ):
        tokopt.compile(bundle)


def test_a_bundle_stays_as_it_is() -> None:
    """The modules that nodes come from, which passes and errors name, are not written over on the way."""
    bundle = vision()
    paths = [module_path(node) for node in bundle.main.module.graph.nodes]
    with torch_tensorrt("sm_86"):
        tokopt.compile(bundle)
    assert any(paths) and paths == [module_path(node) for node in bundle.main.module.graph.nodes]


def test_unsigned_bytes_are_refused() -> None:
    bundle = tokopt.optimize(smollm2(), "kivi{group=8 every=32}")
    with (
        torch_tensorrt("sm_86"),
        pytest.raises(LoweringError, match=r"takes unsigned bytes, .*; use int8_kv"),
    ):
        tokopt.compile(bundle)


# --- the artifact -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "vit.tokopt"
    with torch_tensorrt("sm_86"):
        options = EngineOptions(profiles=("batch=1:4:16",))
        return tokopt.export(tokopt.optimize(vision(), "int8"), path, target="torch-tensorrt", engine=options)


def test_manifest_describes_what_was_compiled(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    entry = manifest.programs["forward"]
    assert entry.files == {"torch": "forward.pt2", "tensorrt": "forward.sm_86.pt2"}
    assert entry.engine is not None and entry.engine.builder == "torch-tensorrt-rtx"
    assert (entry.engine.arch, entry.engine.profiles) == ("sm_86", {"batch": Profile(1, 4, 16)})
    assert {path.name for path in artifact.iterdir()} == {"manifest.json", *manifest.files}
    assert tokopt.verify(artifact).ok
    assert tokopt.open_bundle(artifact).pipeline == "int8"


def test_it_opens_where_it_was_compiled_for(artifact: Path) -> None:
    with torch_tensorrt("sm_86"):
        opened = tokopt.open_compiled(artifact)
    program = opened.programs[opened.main]
    assert [spec.name for spec in program.outputs] == ["tokens", "pooled"]
    with pytest.raises(InputError, match="takes 1 tensors, patches, and got 2"):
        opened(torch.zeros(1), torch.zeros(1))


def test_it_does_not_open_elsewhere(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another GPU and another version: what is needed, what was found, and the command."""
    needs = r"needs torch-tensorrt-rtx 2\.\S+ with TensorRT \S+ on sm_86, and here is torch-tensorrt-rtx"
    with torch_tensorrt("sm_89"), pytest.raises(ArtifactError, match=needs) as error:
        tokopt.open_compiled(artifact)
    command = f"tokopt export MODEL -o {artifact} --target torch-tensorrt --arch sm_89"
    assert command in str(error.value) and str(error.value).endswith("(tokopt.open_bundle)")
    with torch_tensorrt("sm_86"):
        monkeypatch.setattr("torch_tensorrt.__version__", "2.12.0")
        with pytest.raises(ArtifactError, match=needs + r" 2\.12\.0"):
            tokopt.open_compiled(artifact)


def test_other_artifacts_are_refused(tmp_path: Path) -> None:
    plain = tokopt.export(vision(), tmp_path / "plain.tokopt", target="torch")
    with pytest.raises(
        ArtifactError, match="was not compiled by Torch-TensorRT; compile it with: tokopt exp"
    ):
        tokopt.open_compiled(plain)


# --- options, and what is missing -------------------------------------------------------------------------


def test_options_that_do_not_fit() -> None:
    with torch_tensorrt("sm_86"):
        with pytest.raises(LoweringError, match="builds for the GPU that it finds, sm_86, not for sm_89"):
            tokopt.compile(vision(), engine=EngineOptions("sm_89"))
        with pytest.raises(InputError, match="leave plugins out"):
            tokopt.compile(vision(), engine=EngineOptions(plugins=True))
    with pytest.raises(InputError, match="no backend 'onnxruntime' that compiles in the process"):
        tokopt.compile(vision(), "onnxruntime")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_missing_gpu_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="for the GPU that PyTorch finds, and it finds none; compile where"):
        tokopt.compile(vision())
    with pytest.raises(InputError, match="it finds none"):
        tokopt.export(vision(), tmp_path / "a.tokopt", target="torch-tensorrt")
    assert not list(tmp_path.iterdir())


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_gpu", lambda: build.Gpu("cpu", "sm_86"))
    monkeypatch.setitem(
        sys.modules, "torch_tensorrt", None
    )  # what import finds of a package that is not there
    with pytest.raises(MissingDependencyError, match=r"pip install 'tokopt\[torch-tensorrt\]'"):
        tokopt.compile(vision())


def test_its_tensorrt_is_known_by_its_name() -> None:
    """Once imported, it puts TensorRT-RTX in the place of TensorRT."""
    with torch_tensorrt("sm_86"):
        assert import_tensorrt()[0] == "tensorrt-rtx"
