"""Engines on the GPU that they were built for: ``python -m pytest tests/gpu``, on a machine with TensorRT.

What an engine computes, with plugins and without, is what its portable ONNX file computes on ONNX Runtime.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tokopt
from tests.lower.encoders import vision
from tests.matrix import language
from tokopt import EngineOptions
from tokopt.runtime import LanguageModel, load
from tokopt.runtime.format.manifest import read_manifest

pytest.importorskip("tensorrt", reason="plugins take TensorRT, not TensorRT-RTX")

PIPELINES = ("tome{r=3}", "pitome{r=3}", "evit{keep=0.7}", "divprune{keep=0.7}", "kcenter{keep=0.7}")


@pytest.mark.parametrize("plugins", [False, True])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_engine_equals_portable(pipeline: str, plugins: bool, tmp_path: Path) -> None:
    if not plugins and pipeline.startswith(("divprune", "kcenter")):
        pytest.skip("a loop, which is refused without plugins")
    bundle = tokopt.optimize(vision(), pipeline)
    options = EngineOptions(profiles=("batch=1:5:8",), plugins=plugins)
    path = tokopt.export(bundle, tmp_path / "model.tokopt", target="tensorrt", engine=options)
    engine = read_manifest(path).programs["forward"].engine
    assert engine is not None and bool(engine.plugins) == plugins
    patches = np.random.default_rng(0).standard_normal((5, 20, 12), dtype=np.float32)
    wanted = load(path).run(patches=patches)
    on_gpu = load(path, backend="tensorrt")
    for _ in range(5):  # later calls replay a captured graph
        for name, got in on_gpu.run(patches=patches).items():
            np.testing.assert_allclose(got, wanted[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("plugins", [False, True])
def test_evicted_text_is_the_same(plugins: bool, tmp_path: Path) -> None:
    bundle = tokopt.optimize(language.bundle("llama"), "h2o{budget=12 sinks=2 recent=4 every=3}")
    options = EngineOptions(profiles=("slots=64", "tokens=1:1:16"), plugins=plugins)
    path = tokopt.export(bundle, tmp_path / "model.tokopt", target="tensorrt", engine=options)
    models: tuple[LanguageModel, ...] = (load(path), load(path, backend="tensorrt"))
    portable, engine = (model.generate(language.prompt(10), max_tokens=30).tokens for model in models)
    assert engine == portable
