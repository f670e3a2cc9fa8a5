"""Nodes that ONNX Runtime's CUDA provider has no kernels for, by its own table."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from onnx.defs import get_schema

import tokopt
from tests.lower.encoders import vision
from tokopt.lower.onnxruntime.cuda import KERNELS, lacking


def saved(path: Path, opset: int, *nodes: onnx.NodeProto, dtype: int = TensorProto.FLOAT) -> Path:
    given = helper.make_tensor_value_info("x", dtype, [2, 3])
    made = helper.make_tensor_value_info("y", dtype, None)
    graph = helper.make_graph([*nodes], "g", [given], [made])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), path)
    return path


def test_operators_versions_and_dtypes_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    transpose = helper.make_node("Transpose", ["x"], ["y"])
    assert lacking(saved(path, 23, transpose)) == {}
    assert lacking(saved(path, 24, transpose)) == {"Transpose-24": 1}  # defined anew: no kernel yet
    assert lacking(saved(path, 23, helper.make_node("Exp", ["x"], ["y"]), dtype=TensorProto.INT64)) == {
        "Exp-13 of int64": 1
    }
    other = helper.make_node("MatMulNBits", ["x"], ["y"], domain="com.microsoft")
    assert lacking(saved(path, 23, other)) == {"com.microsoft::MatMulNBits": 1}
    assert lacking(saved(path, 23, helper.make_node("BitShift", ["x"], ["y"]))) == {"BitShift-11": 1}


@pytest.mark.parametrize("name", KERNELS)
def test_versions_of_the_table_are_versions_of_the_operator(name: str) -> None:
    for version in KERNELS[name][0]:
        assert get_schema(name, version, "").since_version == version


def test_functions_are_looked_into(tmp_path: Path) -> None:
    """The blocks of a merged encoder have kernels for all that multiplies and matches."""
    path = tokopt.export(tokopt.optimize(vision(), "tome{r=3}"), tmp_path / "vit.tokopt", check=False)
    found = lacking(path / "forward.onnx")
    names = {name.partition("-")[0] for name in found}
    assert not any(name.startswith("tokopt::") for name in found)
    assert not names & {
        "MatMul",
        "Gemm",
        "Attention",
        "LayerNormalization",
        "TopK",
        "GatherElements",
        "Softmax",
    }
