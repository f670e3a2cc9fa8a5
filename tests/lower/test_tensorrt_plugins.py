"""Graphs with plugins: what TensorRT is given, executed on the CPU.

ONNX's reference evaluator runs the graph, and every plugin node by the source of its kernel through the host shim. No
plugin is executed by TensorRT here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import tokopt
from tests.kernels.host import run_plugin
from tests.lower.encoders import text, vision
from tests.matrix import language
from tokopt import Bundle, EngineOptions
from tokopt.errors import InputError
from tokopt.kernels.launch import signatures
from tokopt.kernels.plugins import PLUGIN_OPS, Launch
from tokopt.lower.tensorrt.engine import EngineBuilder
from tokopt.lower.tensorrt.graph import rewrite_for_tensorrt
from tokopt.lower.tensorrt.plugins import use_plugins, used_plugins
from tokopt.runtime import load
from tokopt.runtime.format.manifest import read_manifest
from tokopt.runtime.selftest import read_selftest


@cache
def exported(pipeline: str) -> Path:
    return tokopt.export(tokopt.optimize(vision(), pipeline), Path(mkdtemp()) / "model.tokopt")


def plugged(path: Path) -> tuple[ir.Model, list[str]]:
    """The graph that TensorRT gets in the place of the portable one, and what has no plugin."""
    model = ir.load(path)
    reasons = use_plugins(model)
    rewrite_for_tensorrt(model, {})
    return model, reasons


def nodes(model: ir.Model) -> dict[str, int]:
    """How often each plugin is called."""
    found: dict[str, int] = {}
    for node in model.graph.all_nodes():
        if node.domain == "tokopt":
            found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def kernel_ops() -> list[type[OpRun]]:
    """Every plugin as an operator of the evaluator."""

    def operator(op: str, kernel: str) -> type[OpRun]:
        def run(self: OpRun, *inputs: np.ndarray, launch: str) -> tuple[np.ndarray, ...]:
            tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in inputs]
            return tuple(made.numpy() for made in run_plugin(op, Launch.from_json(launch), tensors))

        return type(f"{op}_{kernel}", (OpRun,), {"op_domain": "tokopt", "_run": run})

    return [operator(op, kernel) for op in PLUGIN_OPS for kernel in signatures(op)]


def evaluate(model: ir.Model, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    whole = ir.external_data.load_to_model(model)
    made = ReferenceEvaluator(ir.to_proto(whole), new_ops=kernel_ops()).run(None, dict(feed))
    assert isinstance(made, list)
    return made


@pytest.mark.parametrize(
    ("pipeline", "ops"),
    [
        ("tome{r=3}", {"bipartite_match", "merge_tokens"}),
        ("pitome{r=3}", {"energy_bipartite_match", "energy_match", "merge_tokens"}),
        ("evit{keep=0.7}", {"top_tokens", "gather_tokens"}),
        ("divprune{keep=0.7}", {"farthest_point", "gather_tokens"}),
        ("kcenter{keep=0.7}", {"farthest_point", "gather_tokens"}),
    ],
)
def test_graphs_compute_the_same(pipeline: str, ops: set[str]) -> None:
    """Loops, which TensorRT's builder does not take, are gone too."""
    path = exported(pipeline)
    model, reasons = plugged(path / "forward.onnx")
    assert not reasons
    called = nodes(model)
    assert {op for op in PLUGIN_OPS for name in called if name.startswith(f"{op}_")} >= ops
    assert all(node.op_type != "Loop" for node in model.graph.all_nodes())
    generator = np.random.default_rng(0)
    feed = {"patches": generator.standard_normal((5, 20, 12), dtype=np.float32)}
    wanted = load(path).run(**feed)
    for value, got in zip(model.graph.outputs, evaluate(model, feed), strict=True):
        np.testing.assert_allclose(got, wanted[str(value.name)], rtol=1e-4, atol=1e-5)


def test_a_cache_is_compacted_by_plugins(tmp_path: Path) -> None:
    bundle = tokopt.optimize(language.bundle("hand_written"), "h2o{budget=12 sinks=2 recent=4 every=3}")
    path = tokopt.export(bundle, tmp_path / "model.tokopt")
    step, _ = plugged(path / "step.onnx")
    assert nodes(step)["attention_mass_masses"] == nodes(step)["attention_mass_normalizers"] > 0
    model, _ = plugged(path / "compact.onnx")
    assert nodes(model)["keep_slots_keep"] > 0
    test = read_selftest(path, read_manifest(path), "compact")
    for value, got in zip(model.graph.outputs, evaluate(model, test.inputs), strict=True):
        np.testing.assert_allclose(got, test.outputs[str(value.name)], rtol=1e-4, atol=1e-5)


def test_a_share_of_any_number_of_tokens_has_no_plugin(tmp_path: Path) -> None:
    path = tokopt.export(tokopt.optimize(text(), "tome{keep=0.6}"), tmp_path / "model.tokopt")
    model, reasons = plugged(path / "forward.onnx")
    assert any("bipartite_match" in reason and "its r is computed" in reason for reason in reasons)
    assert "bipartite_match_place" not in nodes(model)


def test_the_manifest_names_plugins_by_their_code() -> None:
    model, _ = plugged(exported("tome{r=3}") / "forward.onnx")
    entries = used_plugins(model, "sm_90")
    assert [entry.name for entry in entries] == sorted(f"tokopt::{name}" for name in nodes(model))
    assert entries == used_plugins(model, "sm_90") != used_plugins(model, "sm_80")


def test_tensorrt_rtx_has_no_plugins() -> None:
    bundle: Bundle = vision()
    with pytest.raises(InputError, match="has no plugins in Python; leave plugins out, or install TensorRT"):
        EngineBuilder(bundle, EngineOptions("sm_86", plugins=True))
