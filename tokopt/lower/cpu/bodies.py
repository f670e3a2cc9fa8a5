"""What the ops of ``tokopt.cpu`` compute, in standard ops, for files that call them.

ONNX Runtime calls the registered kernel where there is one, and else the body, as any other runtime does. A body keeps
activations in float32, where the kernel rounds them to 8 bits: it says what the weights are, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tokopt.kernels.cpu import DOMAIN
from tokopt.lower.onnx.expand import Body

OP = "QuantizedLinear"

INPUTS = ("x", "codes", "scale", "zero", "minimum", "bias")


def overload(bits: int, given: Sequence[str]) -> str:
    """The name of the body for weights of so many bits with these optional inputs: ``4_minimum_bias``."""
    return "_".join([str(bits), *given])


def quantized_linear(bits: int, given: Sequence[str], opset: int) -> ir.Function:
    """The body of ``QuantizedLinear`` with the optional inputs ``given``, of ``zero``, ``minimum`` and ``bias``."""
    body = Body(INPUTS)
    x, codes, scale = (body.inputs[name] for name in INPUTS[:3])
    zero, minimum = (body.inputs[name] if name in given else None for name in ("zero", "minimum"))
    weight = body.blocks(bits, codes, scale, zero, minimum)
    matrix = body.op("Reshape", [weight, body.constant((0, -1), np.int64)])
    y = body.op("MatMul", [x, body.op("Transpose", [matrix], perm=[1, 0])])
    if "bias" in given:
        y = body.op("Add", [y, body.inputs["bias"]])
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("bits", "group")]
    return ir.Function(DOMAIN, OP, overload(bits, given), graph=body.graph(y, opset), attributes=attributes)
