"""Fewer and larger nodes around products with weights, in standard ops.

Products of one tensor with several weights become one product. Queries, keys and values are three products of one x,
gate and up two: one call reads x once, quantizes it once, and pays for starting a kernel once, which is what a step of
a single token mostly pays for. The weights are put side by side, the result is split; a factor that all parts share and
the biases move before the split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from tokopt.lower.onnx.nodes import array, discard, input_at
from tokopt.lower.onnx.rule import Candidate, Rule, Unfit
from tokopt.lower.onnx.weights import put_initializer, take_over


@dataclass(frozen=True)
class _Kind:
    """What weights have to have in common to stand side by side."""

    dtype: str
    block: int = 0
    operands: int = 1
    shared: str = ""

    def __str__(self) -> str:
        return self.dtype + (f" in blocks of {self.block}" if self.block else "")


class MergeProducts(Rule[list[ir.Node]]):
    """``MatMul(x, w)`` with one x and weights of one kind. The products of one x and one kind are one candidate."""

    name: ClassVar[str] = "products of one tensor with several weights as one product"

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """The products of every x that several weights are multiplied with, by the kind of the weight."""
        groups: dict[ir.Value, dict[_Kind, list[ir.Node]]] = {}
        for node in graph:
            if (
                node.op_type == "MatMul"
                and not node.domain
                and (kind := _kind(input_at(node, 1))) is not None
            ):
                groups.setdefault(input_at(node, 0), {}).setdefault(kind, []).append(node)
        for kinds in groups.values():
            if sum(map(len, kinds.values())) > 1:
                yield from kinds.values()

    def match(self, graph: ir.Graph, candidate: Candidate) -> list[ir.Node]:
        """The products, which are several."""
        if len(candidate) > 1:
            return list(candidate)
        kind = _kind(input_at(candidate[0], 1))
        if kind is not None and kind.shared:
            raise Unfit("its weight is read elsewhere too")
        raise Unfit(f"its weight is {kind}, those of the products beside it are not")

    def fuse(self, graph: ir.Graph, site: list[ir.Node]) -> None:
        """One product, and a split."""
        _merge(graph, site)


@dataclass(frozen=True)
class _Sums:
    """``split(a) + split(b)``: the split whose parts are added to those of the other, and the sums."""

    split: ir.Node
    other: ir.Node
    sums: list[ir.Node]


class MergeSums(Rule[_Sums]):
    """``split(a) + split(b)``, part by part, as ``split(a + b)``."""

    name: ClassVar[str] = "sums of the parts of two tensors as one sum"

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every split whose first part is added to a part of another one."""
        for node in list(graph):
            user = _only_user(node.outputs[0], "Add") if _has_sizes(node) else None
            other = _other(user, node.outputs[0])
            second = other.producer() if other is not None else None
            if second is not None and second is not node and _has_sizes(second):
                yield (node, second)

    def match(self, graph: ir.Graph, candidate: Candidate) -> _Sums:
        """The sums of all parts."""
        split, second = candidate
        sums = [_only_user(end, "Add") for end in split.outputs]
        added = [_other(user, end) for user, end in zip(sums, split.outputs, strict=True)]
        if list(second.outputs) != added or any(_only_user(end, "Add") is None for end in second.outputs):
            raise Unfit(
                "a part is read by something else, or added to another part than the one in its place"
            )
        if second.inputs[1] is not split.inputs[1] or second.attributes != split.attributes:
            raise Unfit("the parts have other sizes")
        return _Sums(split, second, [node for node in sums if node is not None])

    def fuse(self, graph: ir.Graph, site: _Sums) -> None:
        """One sum, and one split."""
        before = site.sums[0]
        whole = _insert(graph, before, "Add", [site.split.inputs[0], site.other.inputs[0]])
        sizes = [int(size) for size in array(site.split.inputs[1])]
        _split(graph, before, whole, [node.outputs[0] for node in site.sums], sizes)


def _has_sizes(node: ir.Node) -> bool:
    """Whether a node is a split whose parts have sizes of their own, not one into equal parts."""
    return node.op_type == "Split" and len(node.inputs) > 1


def _kind(weight: ir.Value) -> _Kind | None:
    """The kind of a weight; None for what is no weight."""
    maker = weight.producer()
    if maker is None:
        plain = weight.const_value is not None and weight.shape is not None and len(weight.shape) == 2
        return _Kind(str(weight.dtype).lower()) if plain else None
    if maker.op_type != "DequantizeLinear" or any(v is None or v.const_value is None for v in maker.inputs):
        return None
    codes = str(input_at(maker, 0).dtype).lower()
    shared = weight.name or "" if len(weight.uses()) > 1 else ""
    return _Kind(codes, maker.attributes.get_int("block_size", 0), len(maker.inputs), shared)


def _is_vector(value: ir.Value | None) -> bool:
    """Whether a value is a constant along the last axis of what it is combined with."""
    known = value is not None and value.const_value is not None and value.shape is not None
    return known and len(value.shape) == 1 and value.shape[0] != 1  # type: ignore[union-attr,arg-type]


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
            operand = put_initializer(graph, name, np.concatenate([array(other) for other in others]))
        else:
            continue
        whole = _insert(graph, anchor, operation, [whole, operand])
        ends = [user.outputs[0] for user in users]  # type: ignore[union-attr]
    _split(graph, anchor, whole, ends, sizes)
    for end in ends:
        discard(graph, end)


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


def _side_by_side(graph: ir.Graph, weights: Sequence[ir.Value], before: ir.Node) -> ir.Value:
    """One weight [in, sum of outs]."""
    maker = weights[0].producer()
    if maker is None:
        # By all their names: layers may share one weight and have different ones beside it.
        name = f"{'_'.join(str(weight.name) for weight in weights)}_merged"
        return put_initializer(graph, name, np.concatenate([array(w) for w in weights], axis=1))
    makers = [weight.producer() for weight in weights]
    operands = []
    codes = maker.inputs[0].name  # type: ignore[union-attr]
    for i in range(len(maker.inputs)):
        arrays = [array(one.inputs[i]) for one in makers]  # type: ignore[union-attr]
        # Not by its own name: layers may share zero points and be merged with different ones.
        operands.append(put_initializer(graph, f"{codes}_merged_{i}", np.concatenate(arrays, axis=-1)))
    made = ir.node("DequantizeLinear", operands, attributes=dict(maker.attributes))
    made.metadata_props.update(maker.metadata_props)
    made.outputs[0].type = weights[0].type
    made.outputs[0].shape = ir.Shape([weights[0].shape[0], sum(map(_columns, weights))])  # type: ignore[index]
    graph.insert_before(before, made)
    return made.outputs[0]
