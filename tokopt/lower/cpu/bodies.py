"""What the ops of ``tokopt.cpu`` compute, in standard ops, for files that call them.

ONNX Runtime calls the registered kernel where there is one, and else the body, as any other runtime does. A body keeps
activations in float32, where the kernel rounds them to 8 bits: it says what the weights are, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tokopt.kernels.cpu import DOMAIN

OP = "QuantizedLinear"

INPUTS = ("x", "codes", "scale", "zero", "minimum", "bias")


def overload(bits: int, given: Sequence[str]) -> str:
    """The name of the body for weights of so many bits with these optional inputs: ``4_minimum_bias``."""
    return "_".join([str(bits), *given])


def quantized_linear(bits: int, given: Sequence[str], opset: int) -> ir.Function:
    """The body of ``QuantizedLinear`` with the optional inputs ``given``, of ``zero``, ``minimum`` and ``bias``."""
    build = _Builder({name: ir.Value(name=name) for name in INPUTS})
    x, codes, scale = (build.inputs[name] for name in INPUTS[:3])
    numbers = build.unpacked(codes) if bits == 4 else codes
    shape = build.op("Concat", [build.op("Shape", [scale]), build.constant([-1], np.int64)], axis=0)
    weight = build.op("Cast", [build.op("Reshape", [numbers, shape])], to=ir.DataType.FLOAT)
    if "zero" in given:
        weight = build.op("Sub", [weight, build.per_block("zero")])
    elif "minimum" not in given:
        weight = build.op("Sub", [weight, build.constant(1 << (bits - 1), np.float32)])
    weight = build.op("Mul", [weight, build.per_block("scale")])
    if "minimum" in given:
        weight = build.op("Add", [weight, build.per_block("minimum")])
    matrix = build.op("Reshape", [weight, build.constant([0, -1], np.int64)])
    y = build.op("MatMul", [x, build.op("Transpose", [matrix], perm=[1, 0])])
    if "bias" in given:
        y = build.op("Add", [y, build.inputs["bias"]])
    graph = ir.Graph(list(build.inputs.values()), [y], nodes=build.nodes, opset_imports={"": opset})
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("bits", "group")]
    return ir.Function(DOMAIN, OP, overload(bits, given), graph=graph, attributes=attributes)


class _Builder:
    """The nodes of a body, in order."""

    def __init__(self, inputs: dict[str, ir.Value]) -> None:
        self.inputs = inputs
        self.nodes: list[ir.Node] = []

    def op(self, operation: str, given: Sequence[ir.Value], **attributes: object) -> ir.Value:
        """The output of one more node."""
        node = ir.node(operation, given, attributes=attributes)  # type: ignore[arg-type]
        node.outputs[0].name = f"value_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, number: int | list[int], dtype: type[np.generic]) -> ir.Value:
        """A number, or a list of them."""
        return self.op("Constant", [], value=ir.tensor(np.array(number, dtype)))

    def per_block(self, name: str) -> ir.Value:
        """An input [out, blocks] as float32 [out, blocks, 1]."""
        wide = self.op("Cast", [self.inputs[name]], to=ir.DataType.FLOAT)
        return self.op("Unsqueeze", [wide, self.constant([-1], np.int64)])

    def unpacked(self, codes: ir.Value) -> ir.Value:
        """Two codes of every byte, the low one first: [out, in / 2, 2]."""
        last = self.constant([-1], np.int64)
        low = self.op("BitwiseAnd", [codes, self.constant(15, np.uint8)])
        high = self.op("BitShift", [codes, self.constant(4, np.uint8)], direction="RIGHT")
        pair = [self.op("Unsqueeze", [half, last]) for half in (low, high)]
        return self.op("Concat", pair, axis=-1)
