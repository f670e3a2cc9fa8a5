"""Weights in blocks are stored once, by output and in 16 bits where that is exact, and say what they said."""

from __future__ import annotations

import collections
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn

import tokopt
from tests.matrix.test_quantize import on_grid
from tokopt.lower.onnx.embedding import expand_embeddings
from tokopt.lower.onnx.rule import apply_rule
from tokopt.lower.onnx.storage import StoreByOutput, blocks_of, load_constants, narrowed
from tokopt.runtime import load

KINDS = {"Q4_0": "gather_weight_4", "Q4_1": "gather_weight_4_minimum", "Q8_0": "gather_weight_8"}
"""Kind of block in GGUF files -> the function that gathers its rows."""

kinds = pytest.mark.parametrize("kind", KINDS)


def full_grid(kind: str, outputs: int, inputs: int, seed: int = 0) -> Tensor:
    """Weights as files hold them whose every block was rounded from its smallest number to its largest."""
    generator = torch.Generator().manual_seed(seed)
    size = (outputs, inputs // 32, 32)
    low, high = {"Q4_0": (-8, 7), "Q4_1": (0, 15), "Q8_0": (-127, 127)}[kind]
    codes = torch.randint(low, high + 1, size, generator=generator).float()
    codes[..., 0], codes[..., 1] = low, high
    scale, least = (torch.rand(*size[:2], 1, generator=generator).half().float() for _ in range(2))
    return (scale * codes - (least if kind == "Q4_1" else 0)).flatten(1) * 0.125


class Tied(nn.Module):
    """ids [batch, tokens] -> logits, by one table of 40 rows, whose numbers lie on a grid."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.head = nn.Linear(64, 40, bias=False)
        self.embed.weight.data = weight
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).tanh())


def exported(
    weight: Tensor, folder: Path, passes: str = "keep_grid"
) -> tuple[tokopt.Bundle, Path, list[str]]:
    made = tokopt.capture(Tied(weight), (torch.arange(10).view(2, 5),))
    made = tokopt.optimize(made, passes)
    lines: list[str] = []
    return made, tokopt.export(made, folder / "model.tokopt", progress=lines.append), lines


def run(model: bytes | str, ids: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: ids})[0])


@kinds
def test_a_tied_table_is_stored_once(kind: str, tmp_path: Path) -> None:
    """Each file gathers from the bytes of the head; there is no float in the artifact that is as large."""
    made, path, _ = exported(full_grid(kind, 40, 64), tmp_path)
    for file in sorted(path.glob("*.onnx")):
        model = onnx.load(file, load_external_data=False)
        calls = collections.Counter(node.op_type for node in model.graph.node)
        assert calls[KINDS[kind]] == 1 and not calls["Gather"]
        held = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer}
        (gather,) = (node for node in model.graph.node if node.op_type == KINDS[kind])
        place = held[gather.input[0]]
        assert sum(given == place for given in held.values()) == (
            1 if "cpu" in file.name or kind == "Q8_0" else 2
        )
        floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
        assert all(np.prod(t.dims) < 40 * 64 for t in floats)
    assert (path / "weights.data").stat().st_size < 40 * 64 * 4
    ids = torch.tensor([[0, 39, 7, 7, 21]])
    got = run(str(path / "forward.onnx"), ids.numpy())
    torch.testing.assert_close(torch.from_numpy(got), made(ids)[0], atol=1e-4, rtol=1e-4)


@kinds
def test_engines_without_codes_get_the_table_again(kind: str, tmp_path: Path) -> None:
    _, path, _ = exported(full_grid(kind, 40, 64), tmp_path)
    model = ir.load(path / "forward.onnx")
    expand_embeddings(model.graph)
    load_constants(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    calls = collections.Counter(node.op_type for node in model.graph)
    assert calls["Gather"] == 1 and not {"Cast", "Expand", "Transpose", KINDS[kind]} & set(calls)
    ids = np.arange(40).reshape(8, 5)
    wanted = run(str(path / "forward.onnx"), ids)
    ir.save(model, path / "plain.onnx")
    np.testing.assert_allclose(run(str(path / "plain.onnx"), ids), wanted, atol=1e-5, rtol=1e-5)


def test_other_passes_leave_the_table(tmp_path: Path) -> None:
    """Weights that were rounded to another grid: gathered from them, every token would begin from other numbers."""
    made, path, _ = exported(full_grid("Q8_0", 40, 64), tmp_path, "rtn{group=32 symmetric=true}")
    assert made.history[-1].notes[-1] == "left in float: 0.01 MB of embeddings"
    calls = collections.Counter(node.op_type for node in ir.load(path / "forward.onnx").graph)
    assert calls["Gather"] == 1
    assert tokopt.verify(path).ok


def block_graph(dtype: np.dtype, zero: bool, group: int = 32) -> tuple[ir.Model, np.ndarray]:
    """``x @ DequantizeLinear(codes [64, 8])``, and the weight."""
    generator = np.random.default_rng(0)
    info = ml_dtypes.iinfo(dtype)
    codes = generator.integers(int(info.min), int(info.max) + 1, (64, 8)).astype(dtype)
    scale = generator.uniform(0.1, 1, (64 // group, 8)).astype(np.float16).astype(np.float32)
    parts = [codes, scale]
    if zero:
        parts.append(generator.integers(int(info.min), int(info.max) + 1, scale.shape).astype(dtype))
    values = [
        ir.Value(name=name, const_value=ir.tensor(part), shape=ir.Shape(part.shape))
        for name, part in zip(("codes", "scale", "zero"), parts, strict=False)
    ]
    for value in values:
        value.type = ir.TensorType(value.const_value.dtype)  # type: ignore[union-attr]
    x = ir.Value(name="x", shape=ir.Shape(["rows", 64]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.node("DequantizeLinear", values, attributes={"axis": 0, "block_size": group})
    product = ir.node("MatMul", [x, weight.outputs[0]])
    y = product.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["rows", 8]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x], [y], nodes=[weight, product], initializers=values, opset_imports={"": 23}, name="product"
    )
    low = parts[2].astype(np.float32) if zero else np.zeros(scale.shape, np.float32)
    full = (codes.astype(np.float32) - low.repeat(group, 0)) * scale.repeat(group, 0)
    return ir.Model(graph, ir_version=11), full


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4, np.int8, np.uint8])
def test_signed_and_unsigned_codes_say_the_same_by_output(dtype: np.dtype, zero: bool) -> None:
    model, weight = block_graph(dtype, zero)
    assert apply_rule(StoreByOutput(), model.graph).fused == 1
    (node,) = (node for node in model.graph if node.op_type == "DequantizeLinear")
    blocks = blocks_of(node)
    assert blocks is not None and (blocks.size, blocks.group) == ((8, 64), 32)
    assert blocks.codes.dtype in (ir.DataType.UINT4, ir.DataType.UINT8)
    low = blocks.zeros().astype(np.float32).repeat(32, 1)
    stored = (blocks.codes.const_value.numpy().astype(np.float32) - low) * blocks.scales().repeat(32, 1)  # type: ignore[union-attr]
    np.testing.assert_array_equal(stored.T, weight)
    x = np.eye(64, dtype=np.float32)
    np.testing.assert_allclose(run(ir.to_proto(model).SerializeToString(), x), weight, rtol=1e-6, atol=1e-6)


@kinds
def test_products_stay_one_kernel_of_onnxruntime(kind: str, tmp_path: Path) -> None:
    """What the file leaves to be computed of constants, an engine computes when it loads: no run does."""
    _, path, _ = exported(full_grid(kind, 40, 64), tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path / "loaded.onnx")
    onnxruntime.InferenceSession(path / "forward.onnx", options, providers=["CPUExecutionProvider"])
    calls = collections.Counter(node.op_type for node in onnx.load(path / "loaded.onnx").graph.node)
    assert calls["MatMulNBits"] == 1 and not {"DequantizeLinear", "Transpose"} & set(calls)


def test_half_precision_is_taken_where_nothing_is_lost() -> None:
    exact = np.array([0.5, -2.0, 6.1e-5, 0.0], np.float32)
    assert narrowed(exact[:2]) is not None and narrowed(np.float32([0.1])) is None  # type: ignore[list-item]
    assert narrowed(np.float32([70000.0])) is None and narrowed(np.float32([1e-9])) is None  # type: ignore[list-item]


def test_minima_that_are_no_half_precision_are_stored_in_full(tmp_path: Path) -> None:
    """Nothing is rounded to make it fit: in some of these blocks the smallest number is not the file's minimum."""
    _, path, lines = exported(on_grid("Q4_1", 40, 64, seed=0), tmp_path)
    assert "forward: embeddings gathered from codes: 1 of 1" in lines
    model = ir.load(path / "forward.onnx")
    (gather,) = (node for node in model.graph if node.op_type == KINDS["Q4_1"])
    minimum = gather.inputs[3]
    assert minimum is not None and minimum.dtype == ir.DataType.FLOAT
    assert tokopt.verify(path).ok


class Untied(nn.Module):
    """ids [batch, tokens] -> embeddings, and logits by a head of its own; the numbers of both lie on a grid."""

    def __init__(self, table: Tensor, head: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.head = nn.Linear(64, 40, bias=False)
        self.embed.weight.data, self.head.weight.data = table, head

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.embed(ids)
        return rows, self.head(rows.tanh())


@pytest.mark.parametrize("kind", [*KINDS, "Q6_K"])
def test_an_untied_table_is_gathered_from_its_own_codes(kind: str, tmp_path: Path) -> None:
    """Its rows are the file's bit for bit, with and without tokopt's kernels, and no table is expanded."""
    table = on_grid(kind, 40, 64, seed=0) if kind == "Q6_K" else full_grid(kind, 40, 64)
    captured = tokopt.capture(
        Untied(table, full_grid("Q4_0", 40, 64, seed=1)), (torch.arange(10).view(2, 5),)
    )
    made = tokopt.optimize(captured, "keep_grid", strict=True)
    assert made.history[-1].matches == 2 and not any(
        "left in float" in note for note in made.history[-1].notes
    )
    path = tokopt.export(made, tmp_path / "model.tokopt")
    for file in path.glob("*.onnx"):
        graph = onnx.load(file, load_external_data=False).graph
        calls = collections.Counter(node.op_type for node in graph.node)
        assert calls[KINDS.get(kind, "gather_weight_8")] == 1 and not calls["Gather"]
        floats = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
        assert all(np.prod(t.dims) < 40 * 64 for t in floats)
    ids = torch.tensor([[0, 39, 7, 7, 21]])
    torch.testing.assert_close(made(ids)[0], table[ids], rtol=0, atol=0)
    for kernels in (False, True):
        rows = load(path, kernels=kernels)(ids.numpy())["output_0"]
        np.testing.assert_array_equal(rows, table[ids].numpy())


def test_a_table_is_left_where_the_head_is(tmp_path: Path) -> None:
    """Codes would be stored beside the float table, which something multiplies with."""
    made, path, _ = exported(full_grid("Q4_0", 40, 64), tmp_path, 'keep_grid{skip=["head"]}')
    assert made.history[-1].matches == 0
    calls = collections.Counter(node.op_type for node in ir.load(path / "forward.onnx").graph)
    assert calls["Gather"] == calls["MatMul"] == 1
