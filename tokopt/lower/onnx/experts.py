"""Weights of experts in the form that engines multiply with.

The graph says ``expert_linear(x, chosen, transposed(weight))``. A float weight is stored as it is read, [experts, in,
out]. No standard op multiplies with parts of a quantized weight that it does not expand first, which takes longer than
multiplying with all of it: so all experts are one weight in blocks, [in, experts x out], whose product engines have a
kernel for, and what the chosen ones made is taken out of it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tokopt.lower.onnx.nodes import array, discard, input_at
from tokopt.lower.onnx.weights import DEQUANTIZE, SWAP, put_initializer, take_over

OTHER_WAY_ROUND = [0, 2, 1]


def place_experts(model: ir.Model) -> None:
    """Bring the weights of every ``expert_linear`` into that form, in place."""
    for node in list(model.graph):
        if node.domain == "tokopt" and node.op_type == "expert_linear":
            weight = _transposed(input_at(node, 2))
            if weight is None:
                continue
            quantized = _quantized(weight)
            if quantized is not None:
                _multiply_all(model.graph, node, quantized)
            elif weight.const_value is not None:
                _store(model.graph, node, weight)


def _transposed(value: ir.Value) -> ir.Value | None:
    """The weight [experts, out, in] that is read as ``value``."""
    turn = value.producer()
    if (
        turn is None
        or turn.op_type != "Transpose"
        or list(turn.attributes["perm"].as_ints()) != OTHER_WAY_ROUND
    ):
        return None
    return input_at(turn, 0)


def _quantized(weight: ir.Value) -> ir.Value | None:
    """The matrix [experts x out, in] that ``weight`` is a view of, where it is made of codes."""
    view = weight.producer()
    matrix = input_at(view, 0) if view is not None and view.op_type == "Reshape" else None
    made = matrix.producer() if matrix is not None else None
    return matrix if made is not None and made.domain == "tokopt" and made.op_type in DEQUANTIZE else None


def _multiply_all(graph: ir.Graph, node: ir.Node, matrix: ir.Value) -> None:
    """The product with all experts, of which those that were chosen are taken."""
    x, chosen, weight = node.inputs
    assert x is not None and chosen is not None and weight is not None and weight.shape is not None
    experts, inputs, outputs = (int(size) for size in weight.shape)  # type: ignore[arg-type]
    turned = ir.node("Transpose", [matrix], attributes={"perm": SWAP})
    product = ir.node("MatMul", [x, turned.outputs[0]])
    taken = ir.node(
        "take_expert", [product.outputs[0], chosen], attributes={"experts": experts}, domain="tokopt"
    )
    old = node.outputs[0]
    for made in (turned, product, taken):
        made.metadata_props.update(node.metadata_props)
        made.outputs[0].type = old.type
    turned.outputs[0].shape = ir.Shape([inputs, experts * outputs])
    if x.shape is not None:
        product.outputs[0].shape = ir.Shape([*list(x.shape)[:2], experts * outputs])
    taken.outputs[0].shape = old.shape
    graph.insert_before(node, [turned, product, taken])
    take_over(taken.outputs[0], old)
    graph.remove(node, safe=True)
    discard(graph, weight)


def _store(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    """A constant as it is read."""
    read = input_at(node, 2)
    turned = np.ascontiguousarray(array(weight).transpose(OTHER_WAY_ROUND))
    node.replace_input_with(2, put_initializer(graph, f"{weight.name}_by_input", turned))
    discard(graph, read)
