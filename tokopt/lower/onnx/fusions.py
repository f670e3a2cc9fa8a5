"""Fewer and larger nodes around products with weights, in standard ops.

A factor per channel after a product (LayerScale) is multiplied into the weight; of codes, into their scales, so that
nothing is rounded anew.

Products of one tensor with several weights become one product. Queries, keys and values are three products of one x,
gate and up two: one call reads x once, quantizes it once, and pays for starting a kernel once, which is what a step of
a single token mostly pays for. The weights are put side by side, the result is split; a factor that all parts share and
the biases move before the split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tokopt.lower.onnx.weights import put_initializer, take_over


def fold_factors(model: ir.Model) -> None:
    """Multiply constant factors per output of ``MatMul(x, w)`` into w and the bias, in place."""
    for node in list(model.graph):
        if node.op_type == "Mul" and not node.domain:
            for value, factor in (node.inputs, node.inputs[::-1]):
                if _is_vector(factor) and _fold(model.graph, node, value, _numpy(factor)):
                    break


def _fold(graph: ir.Graph, node: ir.Node, value: ir.Value | None, factor: np.ndarray) -> bool:
    """Fold the factor of ``value`` at ``node`` where a product, alone or with a bias, is all that made it."""
    add = value.producer() if value is not None and _only_user(value, "Mul") is node else None
    if value is None or add is None:
        return False
    bias = next((i for i, one in enumerate(add.inputs) if add.op_type == "Add" and _is_vector(one)), None)
    made = value if bias is None else add.inputs[1 - bias]
    product = made.producer() if made is not None else None
    if product is None or product.op_type != "MatMul" or product.domain or len(made.uses()) > 1:  # type: ignore[union-attr]
        return False
    weight = product.inputs[1]
    if _kind(weight) is None or _columns(weight) != factor.size or made.is_graph_output():  # type: ignore[union-attr]
        return False
    product.replace_input_with(1, _scaled(graph, weight, factor, product))  # type: ignore[arg-type]
    if bias is not None:
        given = add.inputs[bias]
        name = f"{given.name}_times_{node.outputs[0].name}"  # type: ignore[union-attr]
        add.replace_input_with(bias, put_initializer(graph, name, _numpy(given) * factor))
    take_over(value, node.outputs[0])
    graph.remove(node, safe=True)
    return True


def _scaled(graph: ir.Graph, weight: ir.Value, factor: np.ndarray, product: ir.Node) -> ir.Value:
    """The weight [in, out] of a product with its columns multiplied by a factor each."""
    maker = weight.producer()
    name = f"{weight.name}_times_{product.outputs[0].name}"
    if maker is None:
        return put_initializer(graph, name, _numpy(weight) * factor)
    codes, scale, *zero = maker.inputs
    steps = put_initializer(graph, name, _numpy(scale) * factor)
    made = ir.node("DequantizeLinear", [codes, steps, *zero], attributes=dict(maker.attributes))
    made.metadata_props.update(maker.metadata_props)
    made.outputs[0].type, made.outputs[0].shape = weight.type, weight.shape
    graph.insert_before(product, made)
    return made.outputs[0]


def _is_vector(value: ir.Value | None) -> bool:
    """Whether a value is a constant along the last axis of what it is combined with."""
    known = value is not None and value.const_value is not None and value.shape is not None
    return known and len(value.shape) == 1 and value.shape[0] != 1  # type: ignore[union-attr,arg-type]


def merge_products(model: ir.Model) -> None:
    """Merge every group of ``MatMul(x, w)`` with one x and weights of one kind, in place."""
    groups: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type == "MatMul" and not node.domain and (kind := _kind(node.inputs[1])) is not None:
            groups.setdefault((node.inputs[0], *kind), []).append(node)
    for products in groups.values():
        if len(products) > 1:
            _merge(model.graph, products)
    for split in [node for node in model.graph if node.op_type == "Split"]:
        _merge_sums(model.graph, split)


def _kind(weight: ir.Value | None) -> tuple[object, ...] | None:
    """What weights have to have in common to stand side by side; None for what is no weight."""
    if weight is None:
        return None
    maker = weight.producer()
    if maker is None:
        plain = weight.const_value is not None and weight.shape is not None and len(weight.shape) == 2
        return ("plain", weight.dtype) if plain else None
    if maker.op_type != "DequantizeLinear" or any(v is None or v.const_value is None for v in maker.inputs):
        return None
    if len(weight.uses()) > 1:
        return None
    blocks = maker.attributes.get_int("block_size", 0)
    return ("blocks", blocks, maker.inputs[0].dtype, len(maker.inputs))  # type: ignore[union-attr]


def _merge(graph: ir.Graph, products: list[ir.Node]) -> None:
    first = products[0]
    sizes = [_columns(node.inputs[1]) for node in products]
    made = _side_by_side(graph, [node.inputs[1] for node in products], first)  # type: ignore[misc]
    whole = _insert(graph, first, "MatMul", [first.inputs[0], made])
    ends: list[ir.Value] = [node.outputs[0] for node in products]
    anchor = first
    for operation, shared in (("Mul", True), ("Add", False)):
        users = [_only_user(end, operation) for end in ends]
        others = [_other(user, end) for user, end in zip(users, ends, strict=True)]
        if any(other is None for other in others):
            continue
        if shared and len(set(others)) == 1:
            operand = others[0]
            anchor = _later(graph, anchor, operand)
        elif not shared and all(_is_vector(other) for other in others):
            name = f"{first.outputs[0].name}_bias_merged"
            operand = put_initializer(graph, name, np.concatenate([_numpy(other) for other in others]))
        else:
            continue
        whole = _insert(graph, anchor, operation, [whole, operand])
        ends = [user.outputs[0] for user in users]  # type: ignore[union-attr]
    _split(graph, anchor, whole, ends, sizes)


def _split(
    graph: ir.Graph, anchor: ir.Node, whole: ir.Value, ends: Sequence[ir.Value], sizes: list[int]
) -> None:
    """Let the parts of ``whole`` take the places of ``ends``."""
    lengths = put_initializer(graph, f"split_{'_'.join(map(str, sizes))}", np.array(sizes, np.int64))
    parts = ir.node("Split", [whole, lengths], attributes={"axis": -1}, num_outputs=len(sizes))
    graph.insert_before(anchor, parts)
    for part, end in zip(parts.outputs, ends, strict=True):
        part.type, part.shape = end.type, end.shape
        take_over(part, end)


def _merge_sums(graph: ir.Graph, split: ir.Node) -> None:
    """``split(a) + split(b)``, part by part, as ``split(a + b)``."""
    ends = list(split.outputs)
    users = [_only_user(end, "Add") for end in ends]
    others = [_other(user, end) for user, end in zip(users, ends, strict=True)]
    second = others[0].producer() if others[0] is not None else None
    if second is None or second is split or second.op_type != "Split" or list(second.outputs) != others:
        return
    same = second.inputs[1] is split.inputs[1] and second.attributes == split.attributes
    if not same or any(_only_user(other, "Add") is None for other in second.outputs):
        return
    whole = _insert(graph, users[0], "Add", [split.inputs[0], second.inputs[0]])  # type: ignore[arg-type]
    sizes = [int(size) for size in _numpy(split.inputs[1])]
    _split(graph, users[0], whole, [user.outputs[0] for user in users], sizes)  # type: ignore[arg-type,union-attr]


def _later(graph: ir.Graph, anchor: ir.Node, operand: ir.Value | None) -> ir.Node:
    """A node to insert before: not earlier than what computes ``operand``."""
    maker = operand.producer() if operand is not None else None
    if maker is None:
        return anchor
    order = {node: place for place, node in enumerate(graph)}
    if order[maker] < order[anchor]:
        return anchor
    return next(node for node, place in order.items() if place > order[maker])


def _insert(graph: ir.Graph, before: ir.Node, operation: str, inputs: Sequence[ir.Value | None]) -> ir.Value:
    made = ir.node(operation, inputs)
    made.metadata_props.update(before.metadata_props)
    made.outputs[0].type = before.outputs[0].type
    graph.insert_before(before, made)
    return made.outputs[0]


def _only_user(value: ir.Value, operation: str) -> ir.Node | None:
    users = [use.node for use in value.uses()]
    one = len(users) == 1 and users[0].op_type == operation and not value.is_graph_output()
    return users[0] if one else None


def _other(user: ir.Node | None, value: ir.Value) -> ir.Value | None:
    """The other operand of an operation with two."""
    if user is None:
        return None
    return user.inputs[1] if user.inputs[0] is value else user.inputs[0]


def _columns(weight: ir.Value | None) -> int:
    assert weight is not None and weight.shape is not None
    size = weight.shape[-1]
    assert isinstance(size, int)
    return size


def _numpy(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def _side_by_side(graph: ir.Graph, weights: Sequence[ir.Value], before: ir.Node) -> ir.Value:
    """One weight [in, sum of outs]."""
    maker = weights[0].producer()
    if maker is None:
        return put_initializer(
            graph, f"{weights[0].name}_merged", np.concatenate([_numpy(w) for w in weights], axis=1)
        )
    makers = [weight.producer() for weight in weights]
    operands = []
    codes = maker.inputs[0].name  # type: ignore[union-attr]
    for i in range(len(maker.inputs)):
        arrays = [_numpy(one.inputs[i]) for one in makers]  # type: ignore[union-attr]
        # Not by its own name: layers may share zero points and be merged with different ones.
        operands.append(put_initializer(graph, f"{codes}_merged_{i}", np.concatenate(arrays, axis=-1)))
    made = ir.node("DequantizeLinear", operands, attributes=dict(maker.attributes))
    made.metadata_props.update(maker.metadata_props)
    made.outputs[0].type = weights[0].type
    made.outputs[0].shape = ir.Shape([weights[0].shape[0], sum(map(_columns, weights))])  # type: ignore[index]
    graph.insert_before(before, made)
    return made.outputs[0]
