"""What TensorRT reads in the place of the portable ONNX graph: the same function in the ops that its builder takes.

- Model-local functions are inlined, and no value is called ``_...``: the builder confuses such names.
- Slots of the cache have a fixed number where an optimisation profile says so: only such a cache is written in place.
- Bytes of a cache are floats between inputs and outputs: the builder takes them nowhere else.
- All experts are multiplied with: no size depends on what was chosen.
- Caches that are no floats are scattered: ``TensorScatter`` takes floats alone.
- Quantization has positive steps and no zero points. What is not so is moved out of the quantized product, where it
  is a constant, or a product of the inputs' sums over the blocks of the weight; the product itself keeps 8 or 4 bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnx_ir.serde import deserialize_function
from onnxscript import INT8, OnnxFunction

from tokopt.kernels.expert_linear.onnx import every_expert_linear
from tokopt.kernels.opset import FLOAT, INT64, TOKOPT, TensorType, op, script
from tokopt.lower.onnx.embedding import expand_embeddings
from tokopt.lower.onnx.nodes import array, input_at, maker
from tokopt.lower.onnx.storage import load_constants
from tokopt.lower.onnx.weights import put_initializer, take_over

BYTES = (ir.DataType.UINT8, ir.DataType.INT8)
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def rewrite_for_tensorrt(model: ir.Model, fixed: Mapping[str, int]) -> None:
    """Rewrite ``model`` in place; ``fixed`` gives the sizes of the named axes that are no longer free."""
    _fix_axes(model.graph, fixed)
    expand_embeddings(model.graph)
    load_constants(model.graph)
    for node in list(model.graph):
        if node.domain == "tokopt" and node.op_type == "cache_write":
            _write_by_index(model, node)
        elif node.domain == "tokopt" and node.op_type == "move_entries":
            _call(model, node, move_entries_by_index)
        elif node.domain == "tokopt" and node.op_type == "expert_linear":
            _call(model, node, every_expert_linear)
        elif node.domain == "tokopt" and node.op_type == "fake_quantize":
            _centre(model, node)
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and not node.domain and _is_weight(node):
            make = _make_positive if _is_float8(node) else _make_symmetric
            make(model.graph, node)
    passes.RemoveUnusedNodesPass()(model)
    passes.InlinePass()(model)
    _widen_bytes(model.graph)
    passes.NameFixPass()(model)
    _rename(model)


def _fix_axes(graph: ir.Graph, fixed: Mapping[str, int]) -> None:
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            sizes = [dim if isinstance(dim, int) else fixed.get(dim.value or "", dim) for dim in value.shape]
            value.shape = ir.Shape(sizes)


def _widen_bytes(graph: ir.Graph) -> None:
    """Let the bytes of a quantized cache be floats of the same value between the inputs and the outputs."""
    bytes_in = [value for value in graph.inputs if value.dtype in BYTES]
    bytes_out = [(value, value.dtype) for value in graph.outputs if value.dtype in BYTES]
    for node in graph.all_nodes():
        if any(_quantizes(value) for value in node.outputs):
            continue
        if node.op_type == "Cast" and node.attributes.get_int("to") in BYTES:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        for value in node.outputs:
            if value.dtype in BYTES:
                value.dtype = ir.DataType.FLOAT
    for value in bytes_in:
        wide = _convert(graph, value, value.dtype, ir.DataType.FLOAT)
        value.replace_all_uses_with(wide.outputs[0])
        wide.replace_input_with(0, value)
        graph.insert_before(graph[0], wide)
    for value, kind in bytes_out:
        narrow = _convert(graph, value, ir.DataType.FLOAT, kind)
        graph.append(narrow)
        take_over(narrow.outputs[0], value)
        narrow.replace_input_with(0, value)


def _quantizes(value: ir.Value) -> bool:
    """Whether a byte belongs to a product of bytes: a code of activations, or a zero point."""
    return any(use.node.op_type in ("QuantizeLinear", "DequantizeLinear") for use in value.uses())


def _convert(graph: ir.Graph, value: ir.Value, old: ir.DataType | None, new: ir.DataType | None) -> ir.Node:
    """Bytes to floats or back: signed ones TensorRT does not cast, but quantizes with a scale of 1."""
    if ir.DataType.INT8 in (old, new):
        one = put_initializer(
            graph, "bytes_step", np.array([1], np.float32)
        )  # of a scalar the builder crashes
        attributes = {"output_dtype": new} if new == ir.DataType.INT8 else {}
        made = ir.node(
            "QuantizeLinear" if attributes else "DequantizeLinear", [value, one], attributes=attributes
        )
    else:
        made = ir.node("Cast", [value], attributes={"to": new})
    assert new is not None
    made.outputs[0].type, made.outputs[0].shape = ir.TensorType(new), value.shape
    return made


def _rename(model: ir.Model) -> None:
    values = [value for node in model.graph.all_nodes() for value in node.outputs]
    values += [value for graph in model.graph.subgraphs() for value in graph.inputs]
    for value in values:
        if value.name and value.name.startswith("_") and not value.is_graph_output():
            value.name = f"value{value.name}"


# --- caches -----------------------------------------------------------------------------------------------


@script(TOKOPT, default_opset=op)
def cache_write_by_index(cache: TensorType, new: TensorType, length: INT64) -> TensorType:
    """``tokopt::cache_write`` for what TensorScatter does not take; no index comes twice."""
    tokens = op.Range(0, op.Squeeze(op.Shape(new, start=-2, end=-1)), 1)
    slot = op.Unsqueeze(length, [1]) + op.Unsqueeze(tokens, [0])
    index = op.Expand(op.Unsqueeze(slot, [1, 3]), op.Shape(new))
    return op.ScatterElements(cache, index, new, axis=2)


@script(TOKOPT, default_opset=op)
def move_entries_by_index(cache: TensorType, path: INT64, length: INT64) -> TensorType:
    """``tokopt::move_entries``, whose cache was written before, so that TensorScatter does not take it."""
    first = op.Unsqueeze(length, [1])
    batch, nodes = op.Shape(path, start=0, end=1), op.Shape(path, start=1, end=2)
    heads, channels = op.Shape(cache, start=1, end=2), op.Shape(cache, start=3, end=4)
    sizes = op.Concat(batch, heads, nodes, channels, axis=0)
    moved = op.GatherElements(cache, op.Expand(op.Unsqueeze(first + path, [1, 3]), sizes), axis=2)
    slot = first + op.Unsqueeze(op.Range(0, op.Squeeze(nodes), 1), [0])
    return op.ScatterElements(cache, op.Expand(op.Unsqueeze(slot, [1, 3]), sizes), moved, axis=2)


def _write_by_index(model: ir.Model, node: ir.Node) -> None:
    cache = node.inputs[0]
    assert cache is not None and cache.shape is not None
    in_place = cache.is_graph_input() and isinstance(cache.shape[-2], int)
    if cache.dtype not in FLOATS or not in_place:
        _call(model, node, cache_write_by_index)


def _call(model: ir.Model, node: ir.Node, function: OnnxFunction) -> None:
    """Let ``node`` call another function of the same inputs."""
    body = deserialize_function(function.to_function_proto())
    body.opset_imports[""] = model.opset_imports[""]
    model.functions[body.identifier()] = body
    node.op_type = function.name


# --- quantization -----------------------------------------------------------------------------------------


@script(TOKOPT, default_opset=op)
def centred_quantize(x: FLOAT, scale: float, zero: int) -> FLOAT:
    """``tokopt::fake_quantize`` of x, plus ``zero * scale``: the codes are the same, the zero point is 0."""
    step = op.Constant(value_float=scale)
    shift = op.Cast(op.Constant(value_int=zero), to=FLOAT.dtype) * step
    middle = op.Cast(op.Constant(value_int=0), to=INT8.dtype)
    return op.DequantizeLinear(op.QuantizeLinear(x + shift, step, middle), step, middle)


def _centre(model: ir.Model, node: ir.Node) -> None:
    """Take the zero point out of rounded activations; products with a weight get back what that adds to them."""
    zero, scale = node.attributes.get_int("zero", 0), node.attributes.get_float("scale", 1.0)
    if not zero:
        return
    graph, rounded = model.graph, node.outputs[0]
    readers = [use.node for use in rounded.uses()]
    shift = np.float32(zero) * np.float32(scale)
    others = [reader for reader in readers if not _multiplies(reader, rounded)]
    _call(model, node, centred_quantize)
    for reader in readers:
        if reader not in others:
            weight = _expanded(maker(input_at(reader, 1)))
            _then(graph, reader, "Add", -shift * weight.sum(axis=0))
    if others:
        back = ir.node("Sub", [rounded, put_initializer(graph, f"{rounded.name}_shift", np.array(shift))])
        graph.insert_after(node, back)
        for reader in others:
            for i, given in enumerate(reader.inputs):
                if given is rounded:
                    reader.replace_input_with(i, back.outputs[0])


def _multiplies(node: ir.Node, given: ir.Value) -> bool:
    """Whether ``node`` is a product of ``given`` with a quantized weight."""
    if node.op_type != "MatMul" or node.inputs[0] is not given or node.inputs[1] is None:
        return False
    maker = node.inputs[1].producer()
    return maker is not None and maker.op_type == "DequantizeLinear" and _is_weight(maker)


def _is_weight(node: ir.Node) -> bool:
    """Whether a DequantizeLinear expands constants [in, out], with a step per output or per block of inputs."""
    constant = all(value is not None and value.const_value is not None for value in node.inputs)
    codes = node.inputs[0]
    return constant and codes is not None and codes.shape is not None and len(codes.shape) == 2


def _parts(node: ir.Node) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [in, out] int16, steps and zero points [blocks, out] of a weight."""
    codes, scale, *zero = map(array, node.inputs)
    scale = np.atleast_2d(scale)
    middle = np.atleast_2d(zero[0]).astype(np.int16) if zero else np.zeros(scale.shape, np.int16)
    return codes.astype(np.int16), scale, middle


def _expanded(node: ir.Node) -> np.ndarray:
    """The weight [in, out] that a DequantizeLinear stands for."""
    codes, scale, zero = _parts(node)
    rows = len(codes) // len(scale)
    return (codes - zero.repeat(rows, 0)).astype(np.float32) * scale.repeat(rows, 0)


def _make_symmetric(graph: ir.Graph, node: ir.Node) -> None:
    """A weight with zero points or negative steps as ``codes * step``, and what is missing after its products."""
    codes, scale, zero = _parts(node)
    four = input_at(node, 0).dtype in (ir.DataType.INT4, ir.DataType.UINT4)
    unsigned = input_at(node, 0).dtype in (ir.DataType.UINT4, ir.DataType.UINT8)
    middle = (8 if four else 128) if unsigned else 0
    centred, negative = (zero == middle).all(), scale < 0
    if centred and not unsigned and (scale > 0).all():
        return
    products = [use.node for use in node.outputs[0].uses()]
    blocks, name = len(scale), node.outputs[0].name
    signed = codes - middle
    if blocks == 1 and centred:
        for product in products if negative.any() else ():
            _then(graph, product, "Mul", np.where(negative[0], -1, 1).astype(scale.dtype))
    else:
        # -1 - c has the range of c, which -c has not.
        signed = np.where(negative.repeat(len(codes) // blocks, 0), -1 - signed, signed)
        offset = np.where(negative, zero - middle + 1, middle - zero) * np.abs(scale)
        sums = put_initializer(graph, f"{name}_offset", offset.astype(scale.dtype))
        for product in products if offset.any() else ():
            _add_block_sums(graph, product, sums, blocks)
    steps = _positive(scale)
    if "block_size" not in node.attributes:
        steps = steps[0]
    _replace(graph, node, signed.astype(ml_dtypes.int4 if four else np.int8), steps)


def _is_float8(node: ir.Node) -> bool:
    """Whether a DequantizeLinear expands 8-bit floats."""
    return input_at(node, 0).dtype == ir.DataType.FLOAT8E4M3FN


def _make_positive(graph: ir.Graph, node: ir.Node) -> None:
    """A weight in 8-bit floats with steps above 0: the numbers have the signs."""
    codes, scale = map(array, node.inputs)
    if not (scale > 0).all():
        _replace(graph, node, codes * np.sign(scale).astype(codes.dtype), _positive(scale))


def _positive(scale: np.ndarray) -> np.ndarray:
    """Steps without their signs; one of 0, whose codes are of no account, is refused as it is."""
    return np.maximum(np.abs(scale), np.finfo(scale.dtype).tiny)


def _replace(graph: ir.Graph, node: ir.Node, codes: np.ndarray, steps: np.ndarray) -> None:
    """Let a weight be made of other codes [in, out] and steps, without zero points."""
    name = node.outputs[0].name
    operands = {"codes": codes, "steps": steps}
    values = [put_initializer(graph, f"{name}_{part}", array) for part, array in operands.items()]
    made = ir.node("DequantizeLinear", values, attributes=dict(node.attributes))
    made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, made)
    node.outputs[0].replace_all_uses_with(made.outputs[0])


def _add_block_sums(graph: ir.Graph, product: ir.Node, offset: ir.Value, blocks: int) -> None:
    """Add to ``x @ weight`` the sums of x over the blocks, times their offsets [blocks, out]."""
    x = product.inputs[0]
    assert x is not None and x.shape is not None
    split = put_initializer(
        graph, f"split_{len(x.shape)}_{blocks}", np.array([*[0] * (len(x.shape) - 1), blocks, -1], np.int64)
    )
    axis = put_initializer(graph, "last_axis", np.array([-1], np.int64))
    parted = ir.node("Reshape", [x, split])
    sums = ir.node("ReduceSum", [parted.outputs[0], axis], attributes={"keepdims": 0})
    scaled = ir.node("MatMul", [sums.outputs[0], offset])
    graph.insert_before(product, [parted, sums, scaled])
    _then(graph, product, "Add", scaled.outputs[0])


def _then(graph: ir.Graph, node: ir.Node, operation: str, operand: ir.Value | np.ndarray) -> None:
    """Let everything that reads ``node`` read what an operation makes of it and ``operand``."""
    old = node.outputs[0]
    if isinstance(operand, np.ndarray):
        operand = put_initializer(graph, f"{old.name}_{operation}", operand)
    made = ir.node(operation, [old, operand])
    made.outputs[0].type, made.outputs[0].shape = old.type, old.shape
    take_over(made.outputs[0], old)
    made.replace_input_with(0, old)
    graph.insert_after(node, made)
