"""Quantized weights in the form that engines turn into one kernel: ``MatMul(x, DequantizeLinear(codes))``.

The graph says ``linear(x, dequantize_weight(codes, scale, zero))`` with codes [out, in] of 8 bits, or
``dequantize_float8(codes, scale)`` with the bytes of 8-bit floats. Here the codes are transposed to [in, out] and
packed to 4 bits where they fit, so that the product needs no transposition: ONNX Runtime reads this pair as one
block-quantized product (``MatMulNBits``), OpenVINO and TensorRT as compressed weights, and any other engine of the
opset expands the weight and multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from tokopt.lower.onnx.nodes import array, discard

SWAP = [1, 0]


def pack_weights(model: ir.Model) -> None:
    """Bring every quantized weight that is read transposed into that form, in place."""
    for node in list(model.graph):
        if node.domain == "tokopt" and node.op_type in DEQUANTIZE:
            _pack(model.graph, node)


def _pack(graph: ir.Graph, node: ir.Node) -> None:
    readers, given = [use.node for use in node.outputs[0].uses()], list(node.inputs)
    products = [reader for reader in readers if _reads_transposed(reader)]
    parts = map(array, node.inputs)
    if not products or len(products) < len(readers):  # 8-bit floats by their function
        if node.op_type == "dequantize_weight":
            _expand(graph, node, *parts)
            _discard_all(graph, given)
        return
    weight = DEQUANTIZE[node.op_type](graph, node, *parts)
    graph.insert_before(node, weight)
    for product in products:
        if product.op_type == "Gemm":
            _gemm_to_matmul(graph, product, weight.outputs[0])
            continue
        product.outputs[0].replace_all_uses_with(weight.outputs[0])
        graph.remove(product, safe=True)
    for reader in [use.node for use in weight.outputs[0].uses()]:
        if reader.op_type == "Gemm":
            _gemm_to_matmul(graph, reader, weight.outputs[0])
    graph.remove(node, safe=True)
    _discard_all(graph, given)


def _discard_all(graph: ir.Graph, values: Sequence[ir.Value | None]) -> None:
    for value in values:
        discard(graph, value)


def _expand(graph: ir.Graph, node: ir.Node, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> None:
    """A weight that is computed with before it is multiplied: in ops that engines evaluate once, when they load.

    ``DequantizeLinear`` they keep for a product to take it in, and would evaluate it in every run.
    """
    outputs, groups = scale.shape
    names = [value.name for value in node.inputs if value is not None]
    four = codes.max(initial=0) < 16
    packed = put_initializer(
        graph, f"{names[0]}_packed", unsigned(codes.reshape(outputs, groups, -1), four=four)
    )
    middle = put_initializer(graph, f"{names[2]}_middle", zero[..., None].astype(np.float32))
    steps = put_initializer(graph, f"{names[1]}_steps", scale[..., None])
    shape = put_initializer(graph, f"{names[0]}_shape", np.array(codes.shape, np.int64))
    wide = ir.node("Cast", [packed], attributes={"to": ir.DataType.FLOAT})
    centred = ir.node("Sub", [wide.outputs[0], middle])
    scaled = ir.node("Mul", [centred.outputs[0], steps])
    flat = ir.node("Reshape", [scaled.outputs[0], shape])
    graph.insert_before(node, [wide, centred, scaled, flat])
    flat.outputs[0].type, flat.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    node.outputs[0].replace_all_uses_with(flat.outputs[0])
    graph.remove(node, safe=True)


def _reads_transposed(node: ir.Node) -> bool:
    if node.op_type == "Transpose":
        return list(node.attributes["perm"].as_ints()) == SWAP
    return node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))


def _dequantize(
    graph: ir.Graph, node: ir.Node, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray
) -> ir.Node:
    """``DequantizeLinear`` of a weight [in, out]."""
    group = node.attributes.get_int("group")
    four = codes.max(initial=0) < 16 and zero.max(initial=0) < 16
    middle = 8 if four else 128
    columns = group == codes.shape[1]
    # Bytes of whole columns are multiplied by bytes; without VNNI, processors saturate where one of the two is signed.
    if (zero == middle).all() and (four or not columns):
        kind = ml_dtypes.int4 if four else np.int8
        parts = [(codes.astype(np.int16) - middle).astype(kind), scale]
    else:
        parts = [unsigned(codes, four=four), scale, unsigned(zero, four=four)]
    if columns:  # one group per output: a scale per column
        parts = [parts[0], *(part[:, 0] for part in parts[1:])]
        attributes = {"axis": 1}
    else:
        attributes = {"axis": 0, "block_size": group}
    return _dequantized(graph, node, parts, attributes)


def unsigned(codes: np.ndarray, *, four: bool) -> np.ndarray:
    """Bytes as codes of 4 bits (all are below 16) or of 8, without a copy: numpy holds one of either in a byte."""
    return codes.view(ml_dtypes.uint4) if four else codes


def _dequantize_float8(graph: ir.Graph, node: ir.Node, codes: np.ndarray, scale: np.ndarray) -> ir.Node:
    """``DequantizeLinear`` of 8-bit floats [in, out], a scale per column."""
    return _dequantized(graph, node, [codes.view(ml_dtypes.float8_e4m3fn), scale[:, 0]], {"axis": 1})


def _dequantized(
    graph: ir.Graph, node: ir.Node, parts: list[np.ndarray], attributes: dict[str, int]
) -> ir.Node:
    """``DequantizeLinear`` of the transposed ``parts`` of a weight [out, in]."""
    operands = [
        put_initializer(graph, f"{given.name}_packed", part.T)
        for given, part in zip(node.inputs, parts, strict=False)
        if given is not None
    ]
    made = ir.node("DequantizeLinear", operands, attributes=attributes)
    made.metadata_props.update(node.metadata_props)
    made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    made.outputs[0].shape = ir.Shape(parts[0].shape[::-1])
    return made


DEQUANTIZE: dict[str, Callable[..., ir.Node]] = {
    "dequantize_weight": _dequantize,
    "dequantize_float8": _dequantize_float8,
}
"""Op -> the node that puts its weight before products."""


def _gemm_to_matmul(graph: ir.Graph, gemm: ir.Node, weight: ir.Value) -> None:
    """A ``Gemm`` as ``MatMul(x, weight) + bias``, which is what engines look for beside compressed weights."""
    given, _, *bias = gemm.inputs
    assert given is not None
    product = ir.node("MatMul", [given, weight])
    nodes = [product]
    if bias and bias[0] is not None:
        nodes.append(ir.node("Add", [product.outputs[0], bias[0]]))
    for made in nodes:
        made.metadata_props.update(gemm.metadata_props)
        made.outputs[0].type, made.outputs[0].shape = gemm.outputs[0].type, gemm.outputs[0].shape
    graph.insert_before(gemm, nodes)
    take_over(nodes[-1].outputs[0], gemm.outputs[0])
    graph.remove(gemm, safe=True)


def take_over(new: ir.Value, old: ir.Value) -> None:
    """Put a value in the place of another everywhere; an output of the graph keeps its name."""
    name = old.name
    if old.is_graph_output():
        old.name, new.name = f"{name}_before", name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def put_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initializer of that name, made if it is not there."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.Tensor(array, name=name)  # maybe transposed: it is copied when it is written
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value
