"""Engines: what passes make builds for a GPU that is not here, or is refused with its reason.

The graph that TensorRT gets is run by ONNX Runtime and compared with the portable one (``check=True``); the engine
itself is not executed.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import tokopt
from tests.lower.encoders import text, vision
from tests.matrix import language
from tests.matrix.test_matrix import captured
from tests.matrix.test_quantize import samples
from tokopt import EngineOptions
from tokopt.errors import ArtifactError, InputError, LoweringError, MissingDependencyError
from tokopt.lower.profiles import choose_profiles, parse_profiles
from tokopt.runtime import load
from tokopt.runtime.manifest import EngineEntry, Profile, read_manifest
from tokopt.runtime.tensorrt import Installed, check_engine, narrowed

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


@pytest.mark.parametrize("name", ["vit", "bert", "swin", "beit", "modernbert", "explicit_softmax"])
def test_models_build(name: str, tmp_path: Path) -> None:
    """One of every kind; ``tests/matrix/test_backends.py`` builds every architecture, merged."""
    tokopt.export(captured(name), tmp_path / "model.tokopt", target="tensorrt", engine=AMPERE)


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("vit", "tome{r=4},int8{activations=static}"),
        ("vit", "int8"),
        ("vit", "rtn{group=16}"),
        ("vit", "rtn{bits=8 group=16}"),
        ("vit", "rtn{group=16 symmetric=true}"),
        ("bert", "tome{r=4},cast{dtype=float16}"),
    ],
)
def test_quantized_models_build(name: str, pipeline: str, tmp_path: Path) -> None:
    bundle = tokopt.optimize(captured(name), pipeline, calibration=samples(name))
    tokopt.export(bundle, tmp_path / "model.tokopt", target="tensorrt", engine=AMPERE)


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("llama", f"streaming{{{EVICTION}}}"),
        ("gpt2", f"h2o{{{EVICTION}}},rtn{{group=16}}"),
        ("gemma3", "kivi"),
    ],
)
def test_language_models_build(name: str, pipeline: str, tmp_path: Path) -> None:
    """Step and compact, with a cache of a fixed number of slots that is written in place."""
    bundle = tokopt.optimize(language.bundle(name), pipeline)
    options = EngineOptions("sm_89", ("slots=64", "tokens=1:1:16"))
    path = tokopt.export(bundle, tmp_path / "model.tokopt", target="tensorrt", engine=options)
    manifest = read_manifest(path)
    assert {"step.sm_89.engine", "compact.sm_89.engine"} <= set(manifest.files)
    engine = manifest.programs["step"].engine
    assert engine is not None
    assert engine.profiles["slots"] == Profile(64, 64, 64) and engine.profiles["tokens"] == Profile(1, 1, 16)
