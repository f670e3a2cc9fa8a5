"""The form for a batch of one says what the portable form says, in fewer nodes."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import pytest

import tokopt
from tests.matrix.language import artifact, bundle, prompt
from tests.zoo.decoders import DECODERS
from tokopt.errors import LoweringError
from tokopt.lower.onnxruntime import attention as lowering
from tokopt.runtime import LanguageModel, load
from tokopt.runtime.buffers import Bound
from tokopt.runtime.engines.onnxruntime import ONE_ROW, PORTABLE

decoders = pytest.mark.parametrize("name", DECODERS)


def operators(model: LanguageModel, form: str) -> collections.Counter[str]:
    graph = onnx.load(
        model.path / model.manifest.programs["step"].files[form], load_external_data=False
    ).graph
    return collections.Counter(node.op_type for node in graph.node)


def logits(model: LanguageModel, ids: list[int], form: str) -> np.ndarray:
    """Logits [tokens, vocabulary]: a prompt in two parts, then one token at a time."""
    request = model.open(1, len(ids))
    entry = model.manifest.programs["step"]
    request.bind("step", Bound(model.sessions.get("step", form), entry, request.buffers))
    parts = [slice(0, 5), slice(5, 9), *(slice(i, i + 1) for i in range(9, len(ids)))]
    found = []
    for part in parts:
        tokens = np.array([ids[part]])
        rows = np.arange(tokens.shape[1])
        made = request.step(tokens, np.arange(len(ids))[None, part], rows).logits
        assert made is not None
        found.append(made[0].copy())
    return np.concatenate(found)


@decoders
def test_every_attention_is_one_node(name: str) -> None:
    """It writes the cache too: what is written beside it are the positions of the slots."""
    portable, fused = (operators(artifact(name), form) for form in (PORTABLE, ONE_ROW))
    assert fused["GroupQueryAttention"] == portable["Attention"] > 0
    assert (fused["Attention"], fused["cache_write"]) == (0, 1)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_nothing_is_transposed_or_rotated_outside(name: str) -> None:
    """Of each layer's queries, keys, values and result nothing is left but the projections."""
    fused = operators(artifact(name), ONE_ROW)
    assert fused["RotaryEmbedding"] == 0
    assert fused["Transpose"] <= 3 and fused["Reshape"] <= 6  # the logits' rows, the tables


@decoders
def test_both_forms_give_the_same_logits(name: str) -> None:
    ids = prompt(14)
    portable, fused = (logits(artifact(name), ids, form) for form in (PORTABLE, ONE_ROW))
    np.testing.assert_allclose(fused, portable, atol=2e-4 * np.abs(portable).max())


@pytest.mark.parametrize(
    "passes", ["streaming{budget=8}", "h2o{budget=8}", "rtn{bits=8 group=16}", "rtn{group=32}", "kivi"]
)
def test_passes_before_it_compose(passes: str) -> None:
    """Portable and fused generate the same from what a pass left."""
    model: LanguageModel = load(artifact("llama", passes).path, threads=1, kernels=False)
    forms = model.manifest.programs["step"].files
    assert ONE_ROW in forms
    ids = prompt(20)
    one = model.generate(ids, max_tokens=12)
    assert model.generate([ids, ids], max_tokens=12) == [one, one]


def test_weights_are_in_the_artifact_once() -> None:
    model = artifact("llama")
    step = model.manifest.programs["step"].files[ONE_ROW]
    assert (model.path / step).stat().st_size < 200_000
    weights = [name for name in model.manifest.files if name.endswith(".data")]
    assert weights == ["weights.data"]


def test_a_wrong_form_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Were the masks dropped, export would say so."""
    shared = lowering._Shared
    monkeypatch.setattr(
        shared, "bias", lambda self, site: self._make(site.place, "Cast", [site.attention.inputs[3]], to=1)
    )
    with pytest.raises(LoweringError, match="differs between ONNX Runtime and the exported program"):
        tokopt.export(bundle("llama"), tmp_path / "model.tokopt")


def test_selftest_runs_both_forms() -> None:
    found = load(artifact("llama").path, kernels=False).selftest()
    assert set(found) == {"step", "step.onnxruntime"}
    assert all(check.ok for checks in found.values() for check in checks)
