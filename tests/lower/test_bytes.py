"""Products of bytes are exact on every processor: those without VNNI saturate where one operand is signed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import tokopt
from tests.lower.test_fusions import Projections
from tokopt.runtime.engines.openvino import sign_weights

PIPELINES = ("int8", "int8{activations=static}")


def artifact(pipeline: str, folder: Path) -> tuple[tokopt.Bundle, Path]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32)
    bundle = tokopt.optimize(tokopt.capture(Projections(bias=True), (x,)), pipeline, calibration=[x])
    return bundle, tokopt.export(bundle, folder / "model.tokopt") / "forward.onnx"


def run(model: Path | bytes, x: np.ndarray, **entries: str) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    for name, value in entries.items():
        options.add_session_config_entry(f"session.{name}", value)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, {session.get_inputs()[0].name: x})]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_plain_onnxruntime_computes_the_program(pipeline: str, tmp_path: Path) -> None:
    """With no options at all, and weights whose products fill 16 bits."""
    bundle, path = artifact(pipeline, tmp_path)
    x = torch.linspace(1, 3, 3 * 5 * 32).reshape(3, 5, 32)
    for got, wanted in zip(run(path, x.numpy()), bundle(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), wanted, atol=3e-2, rtol=1e-2)


def kinds(model: onnx.ModelProto) -> set[int]:
    """The types of the weights that are expanded."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    expanded = [node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    return {types[name] for name in expanded if name in types}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_signed_bytes_are_the_same_weights(pipeline: str, tmp_path: Path) -> None:
    """What OpenVINO reads where the processor has VNNI; compared in float, where nothing saturates."""
    _, path = artifact(pipeline, tmp_path)
    model = onnx.load(path)
    assert kinds(model) == {onnx.TensorProto.UINT8}
    sign_weights(model)
    assert kinds(model) == {onnx.TensorProto.INT8}
    x = np.random.default_rng(0).standard_normal((3, 5, 32), dtype=np.float32)
    unfused = {"disable_quant_qdq": "1"}
    for got, wanted in zip(
        run(model.SerializeToString(), x, **unfused), run(path, x, **unfused), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)
