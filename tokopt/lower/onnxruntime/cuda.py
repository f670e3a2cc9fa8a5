"""Which nodes of an ONNX file ONNX Runtime's CUDA provider has kernels for; the others run on the CPU, and copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir
from onnx.defs import SchemaError, get_schema
from onnx_ir.passes import common as passes

SOURCE = (
    "docs/OperatorKernels.md of github.com/microsoft/onnxruntime at 001d12d2623fd411ce0f83d05abb5e82304a3389"
)
"""What :data:`KERNELS` was read from: the newest kernel of every operator that ONNX files of tokopt may hold."""

_DTYPES = {
    "f": ("FLOAT", "FLOAT16", "DOUBLE"),
    "b": ("BFLOAT16",),
    "?": ("BOOL",),
    "i": ("INT32",),
    "l": ("INT64",),
    "u": ("UINT32", "UINT64"),
    "c": ("INT8",),
    "C": ("UINT8",),
    "h": ("INT16", "UINT16"),
    "8": ("FLOAT8E4M3FN", "FLOAT8E5M2"),
    "4": ("INT4", "UINT4"),
}
"""Letter -> the dtypes that it stands for in :data:`KERNELS`."""

ANY = "fb?ilucCh"
NUMBERS = "fbilucCh"

KERNELS: Mapping[str, tuple[tuple[int, ...], str]] = {
    "Abs": ((13,), NUMBERS), "Add": ((14,), NUMBERS), "And": ((7,), "?"), "ArgMax": ((13,), "f"),
    "ArgMin": ((13,), "f"), "Attention": ((23, 24), "fb"), "Cast": ((23,), ANY + "8"), "Ceil": ((13,), "f"),
    "Clip": ((13,), "flcC"), "Compress": ((11,), ANY), "Concat": ((13,), ANY),
    "ConstantOfShape": ((9,), "l"), "Conv": ((22,), "fb"), "Cos": ((7,), "f"), "CumSum": ((14,), "filu"),
    "DequantizeLinear": ((21,), "cC84"), "Div": ((14,), NUMBERS), "Einsum": ((12,), "f"),
    "Equal": ((13,), "?filu"), "Erf": ((13,), "fb"), "Exp": ((13,), "fb"), "Expand": ((13,), ANY),
    "Flatten": ((13,), ANY), "Floor": ((13,), "f"), "Gather": ((13,), ANY), "GatherElements": ((13,), ANY),
    "GatherND": ((13,), "fb?l"), "Gelu": ((20,), "fb"), "Gemm": ((13,), "fb"), "Greater": ((13,), "filu"),
    "GreaterOrEqual": ((16,), "filu"), "Identity": ((19,), ANY + "8"), "If": ((19,), "?"),
    "IsInf": ((20,), "fb8"), "IsNaN": ((20,), "fb8"), "LayerNormalization": ((17,), "fb"),
    "Less": ((13,), "filu"), "LessOrEqual": ((16,), "filu"), "Log": ((13,), "f"),
    "LogSoftmax": ((13,), "f"), "Loop": ((19,), "l"), "MatMul": ((13,), "fb"),
    "MatMulInteger": ((10,), "c"), "Max": ((13,), "fbilu"), "Min": ((13,), "fbilu"),
    "Mod": ((13,), "fbilu"), "Mul": ((14,), NUMBERS), "Neg": ((13,), "fbilch"), "NonZero": ((13,), "?filC"),
    "Not": ((1,), "?"), "OneHot": ((11,), "il"), "Or": ((7,), "?"), "Pad": ((18,), "?f"),
    "Pow": ((15,), "fbil"), "QuantizeLinear": ((21,), "f"), "RMSNormalization": ((23,), "fb"),
    "Range": ((11,), "fhil"), "Reciprocal": ((13,), "f"), "ReduceL1": ((18,), "fi"),
    "ReduceL2": ((18,), "fi"), "ReduceLogSumExp": ((18,), "f"), "ReduceMax": ((18,), "fil"),
    "ReduceMean": ((18,), "fi"), "ReduceMin": ((18,), "filcC"), "ReduceProd": ((18,), "fi"),
    "ReduceSum": ((13,), "fbil"), "ReduceSumSquare": ((18,), "f"), "Relu": ((14,), "fb"),
    "Reshape": ((23,), ANY + "8"), "Resize": ((19,), "fiC"), "RotaryEmbedding": ((23,), "fb"),
    "Round": ((11,), "f"), "ScatterElements": ((18,), ANY), "ScatterND": ((18,), ANY),
    "Shape": ((23,), ANY + "8"), "Sigmoid": ((13,), "fb"), "Sign": ((13,), NUMBERS), "Sin": ((7,), "f"),
    "Size": ((13,), ANY), "Slice": ((13,), ANY), "Softmax": ((13,), "fb"), "Softplus": ((1,), "f"),
    "Split": ((18,), ANY), "Sqrt": ((13,), "fb"), "Squeeze": ((23,), ANY), "Sub": ((14,), NUMBERS),
    "Sum": ((13,), "fb"), "Tanh": ((13,), "fb"), "TensorScatter": ((24,), ANY), "Tile": ((13,), "fbil"),
    "TopK": ((11,), "fil"), "Transpose": ((23,), ANY), "Trilu": ((14,), ANY), "Unsqueeze": ((23,), ANY),
    "Where": ((16,), "fbilC"), "Xor": ((7,), "?"),
}  # fmt: skip
"""Operator of the standard domain -> the versions that have a kernel, and dtypes of the operand that decides.

A kernel of an older version does not run an operator that a newer opset has defined anew.
"""

DECIDING = {"Where": 1}
"""The operand whose dtype decides, where it is not the first."""


SPELT = {"CastLike": "Cast"}
"""Functions of the standard domain, and what ONNX Runtime makes of them."""


def lacking(path: Path) -> dict[str, int]:
    """What of an ONNX file has no CUDA kernel: ``"Where-16 of bool"``, and how many nodes there are of it.

    Model-local functions are looked into. A node whose operand has no known dtype is judged by its operator alone.
    """
    model = ir.load(path)
    passes.InlinePass()(model)
    opset = model.opset_imports.get("", 0)
    return dict(sorted(Counter(_names(model, opset)).items()))


def _names(model: ir.Model, opset: int) -> Iterator[str]:
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and not node.domain:
            continue  # folded before anything runs
        if node.domain not in ("", "ai.onnx"):
            yield f"{node.domain}::{node.op_type}"
            continue
        operation = SPELT.get(node.op_type, node.op_type)
        since = _since(operation, opset)
        versions, letters = KERNELS.get(operation, ((), ""))
        if since not in versions:
            yield f"{operation}-{since}"
            continue
        place = DECIDING.get(operation, 0)
        given = node.inputs[place] if place < len(node.inputs) else None
        known = {dtype for letter in letters for dtype in _DTYPES[letter]}
        if given is not None and given.dtype is not None and given.dtype.name not in known:
            yield f"{operation}-{since} of {given.dtype.name.lower()}"


def _since(name: str, opset: int) -> int:
    """The version of the operator that this opset has."""
    try:
        return get_schema(name, opset, "").since_version
    except SchemaError:
        return opset
