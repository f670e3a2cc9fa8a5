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
        given = (
            ir.RefAttr(f"value_{kind}", name, TYPES[name])
            for kind, name in (("float", "step"), ("int", "zero"))
        )
        y = made.op("MatMul", [_on_grid(made, x, *given), weight])
    else:
        step = _step(made, x)
        y = made.op("Mul", [made.op("MatMul", [_in_steps(made, x, step), weight]), step])
    if bias:
        y = made.op("Add", [y, made.inputs["bias"]])
    activation = str(attributes.get("activation", ""))
    if activation:
        y = made.op("Gelu", [y], approximate="tanh" if activation == "gelu_tanh" else "none")
    parts = ("static" if "step" in attributes else "dynamic", "bias" if bias else "", activation)
    declared = [ir.Attr(name, TYPES[name], None) for name in attributes]
    overload = "_".join(filter(None, parts))
    return ir.Function(DOMAIN, NAME, overload, graph=made.graph([y], opset), attributes=declared)


def _middles(made: Body, scale: ir.Value) -> ir.Value:
    """128 for every output, as a byte."""
    return made.op("Expand", [made.constant(128, np.uint8), made.op("Shape", [scale])])


def rounding(x: ir.Value, attributes: Mapping[str, ir.Attr]) -> list[ir.Node]:
    """Nodes, of which the last gives ``x`` as a node with these attributes rounds it; in steps where rows have one."""
    made = Body(())
    if "step" in attributes:
        _on_grid(made, x, attributes["step"].as_float(), attributes["zero"].as_int())
    else:
        _in_steps(made, x, _step(made, x))
    return made.nodes


def _on_grid(made: Body, x: ir.Value, step: object, zero: object) -> ir.Value:
    """``x`` on a grid of bytes; its step and zero point are numbers or attributes."""
    scale = made.op("Constant", [], value_float=step)
    middle = made.op("Cast", [made.op("Constant", [], value_int=zero)], to=ir.DataType.UINT8)
    return made.op("DequantizeLinear", [made.op("QuantizeLinear", [x, scale, middle]), scale, middle])


def _in_steps(made: Body, x: ir.Value, step: ir.Value) -> ir.Value:
    """``x`` in whole steps, of which there are at most 127."""
    return made.op("Round", [made.op("Div", [x, step])])


def _step(made: Body, x: ir.Value) -> ir.Value:
    """The step of every row [..., 1]."""
    most = made.op("ReduceMax", [made.op("Abs", [x]), made.constant(LAST, np.int64)], keepdims=1)
    share = made.op("Div", [most, made.constant(127, np.float32)])
    return made.op("Max", [share, made.constant(1e-30, np.float32)])
