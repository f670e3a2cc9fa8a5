"""What ``tokopt.cpu::Int8Linear`` computes, in standard ops, for files that call it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from tokopt.kernels.cpu import DOMAIN
from tokopt.lower.onnx.expand import LAST, Body

NAME = "Int8Linear"

TYPES = {
    "step": ir.AttributeType.FLOAT,
    "zero": ir.AttributeType.INT,
    "activation": ir.AttributeType.STRING,
}
"""The attributes of the op, all of which may be left out."""


def body(attributes: Mapping[str, object], bias: bool, opset: int) -> ir.Function:
    """The body for a node with these attributes; its overload says which: ``static_bias_gelu``."""
    made = Body(("x", "codes", "scale", "bias"))
    x, codes, scale = (made.inputs[name] for name in ("x", "codes", "scale"))
    weight = made.op("DequantizeLinear", [codes, scale, _middles(made, scale)], axis=1)
    if "step" in attributes:
        y = made.op("MatMul", [_rounded(made, x), weight])
    else:
        step = _step(made, x)
        ratio = made.op("Round", [made.op("Div", [x, step])])
        y = made.op("Mul", [made.op("MatMul", [ratio, weight]), step])
    if bias:
        y = made.op("Add", [y, made.inputs["bias"]])
    activation = str(attributes.get("activation", ""))
    if activation:
        y = made.op("Gelu", [y], approximate="tanh" if activation == "gelu_tanh" else "none")
    parts = ("static" if "step" in attributes else "dynamic", "bias" if bias else "", activation)
    declared = [ir.Attr(name, TYPES[name], None) for name in attributes]
    overload = "_".join(filter(None, parts))
    return ir.Function(DOMAIN, NAME, overload, graph=made.graph(y, opset), attributes=declared)


def _middles(made: Body, scale: ir.Value) -> ir.Value:
    """128 for every output, as a byte."""
    return made.op("Expand", [made.constant(128, np.uint8), made.op("Shape", [scale])])


def _rounded(made: Body, x: ir.Value) -> ir.Value:
    """``x`` on the grid of the attributes."""
    step = made.op("Constant", [], value_float=ir.RefAttr("value_float", "step", ir.AttributeType.FLOAT))
    zero = made.op("Constant", [], value_int=ir.RefAttr("value_int", "zero", ir.AttributeType.INT))
    zero = made.op("Cast", [zero], to=ir.DataType.UINT8)
    codes = made.op("QuantizeLinear", [x, step, zero])
    return made.op("DequantizeLinear", [codes, step, zero])


def _step(made: Body, x: ir.Value) -> ir.Value:
    """The step of every row [..., 1]."""
    most = made.op("ReduceMax", [made.op("Abs", [x]), made.constant(LAST, np.int64)], keepdims=1)
    share = made.op("Div", [most, made.constant(127, np.float32)])
    return made.op("Max", [share, made.constant(1e-30, np.float32)])
