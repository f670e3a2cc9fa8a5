"""An embedding whose table is the head's: its rows are gathered from the head's codes, and the table is not stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from tokopt.lower.onnx.expand import LAST, Body
from tokopt.lower.onnx.nodes import array, input_at
from tokopt.lower.onnx.rule import Candidate, Rule, Unfit
from tokopt.lower.onnx.storage import (
    Blocks,
    Offset,
    as_stored,
    blocks_of,
    minimum_of,
    offset_of,
    stored_bytes,
)
from tokopt.lower.onnx.weights import put_initializer, take_over

CLOSE = 1e-6
"""How far a row may be from the table's, relative to its block's largest entry: a few roundings of float32."""

ROWS = 4096
"""Rows that are compared at once."""

GATHER = "gather_weight"
"""The function, whose name goes on with the bits of the codes."""


@dataclass(frozen=True)
class Head:
    """A weight [out, in] in blocks, and what its codes of 0 stand for, where that is no multiple of the scale."""

    blocks: Blocks
    minimum: ir.Value | None

    def rows(self, part: slice) -> np.ndarray:
        """Rows of the weight, float32."""
        blocks = self.blocks
        codes = array(blocks.codes)[part].astype(np.float32)
        grouped = codes.reshape(len(codes), -1, blocks.group)
        scale = blocks.scales()[part, :, None]
        if self.minimum is None:
            return ((grouped - np.float32(blocks.middle)) * scale).reshape(codes.shape)
        low = array(self.minimum)[part, :, None].astype(np.float32)
        return (grouped * scale + low).reshape(codes.shape)


@dataclass(frozen=True)
class _Site:
    """An embedding and the head that its rows are those of."""

    gather: ir.Node
    head: Head


class EmbeddingOfHead(Rule[_Site]):
    """``Gather(table, ids)`` with the numbers of a weight in blocks as what is gathered from that weight."""

    name: ClassVar[str] = "embeddings gathered from the head's codes"

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every embedding with the sizes of a quantized weight."""
        sizes = {blocks.size for blocks, _ in _heads(graph)}
        for node in list(graph):
            table = node.inputs[0] if node.op_type == "Gather" and not node.domain else None
            if table is not None and table.const_value is not None and _size(table) in sizes:
                yield (node,)

    def match(self, graph: ir.Graph, candidate: Candidate) -> _Site:
        """The weight whose rows are the table's."""
        (gather,) = candidate
        table = input_at(gather, 0)
        if gather.attributes.get_int("axis", 0) or table.dtype != ir.DataType.FLOAT:
            raise Unfit("it gathers no rows of float32")
        if any(use.node.op_type != "Gather" for use in table.uses()):
            raise Unfit("its table is multiplied too")
        numbers = array(table)
        reason = "its rows are not those of the quantized weight of its size"
        for blocks, offset in _heads(graph):
            if blocks.size != numbers.shape:
                continue
            head = Head(blocks, None if offset is None else minimum_of(offset))
            if offset is not None and head.minimum is None:
                reason = "the quantized weight of its size has minima that are no numbers of 16 bits"
            elif _same(numbers, head):
                return _Site(gather, head)
        raise Unfit(reason)

    def fuse(self, graph: ir.Graph, site: _Site) -> None:
        """A call of the function, whose body the file holds."""
        blocks, gather = site.head.blocks, site.gather
        given = [stored_bytes(graph, blocks), as_stored(blocks.scale), input_at(gather, 1)]
        if site.head.minimum is not None:
            given.append(site.head.minimum)
        body = _body(blocks.bits, site.head.minimum is not None, self.model.opset_imports[""])
        self.model.functions.setdefault(body.identifier(), body)
        _replace(graph, gather, ir.node(body.name, given, domain=body.domain))


def _size(table: ir.Value) -> tuple[int, ...]:
    assert table.const_value is not None
    return tuple(table.const_value.shape.numpy())


def _heads(graph: ir.Graph) -> Iterator[tuple[Blocks, Offset | None]]:
    """The weights in blocks that are around half the range, or have minima."""
    for node in graph:
        weight = input_at(node, 1).producer() if node.op_type == "MatMul" and not node.domain else None
        blocks = blocks_of(weight) if weight is not None else None
        if blocks is not None and blocks.symmetric:
            yield blocks, offset_of(node)


def _same(table: np.ndarray, head: Head) -> bool:
    """Whether every row of the table is that of the weight, up to rounding."""
    return all(_rows_same(table, head, slice(start, start + ROWS)) for start in range(0, len(table), ROWS))


def _rows_same(table: np.ndarray, head: Head, part: slice) -> bool:
    wanted = table[part].reshape(-1, head.blocks.group)
    found = head.rows(part).reshape(wanted.shape)
    return bool((np.abs(found - wanted).max(1) <= CLOSE * np.abs(wanted).max(1)).all())


def _body(bits: int, has_minimum: bool, opset: int) -> ir.Function:
    """``gather_weight_<bits>(codes, scale, ids)``, with the minimum as a fourth input where there is one."""
    names = ["codes", "scale", "ids", *(["minimum"] if has_minimum else [])]
    body = Body(names)
    ids = body.inputs["ids"]
    parts = {
        name: body.op("Gather", [value, ids], axis=0) for name, value in body.inputs.items() if name != "ids"
    }
    rows = body.blocks(bits, parts["codes"], parts["scale"], None, parts.get("minimum"))
    shape = body.op("Concat", [body.op("Shape", [ids]), body.constant(LAST, np.int64)], axis=0)
    flat = body.op("Reshape", [rows, shape])
    name = f"{GATHER}_{bits}" + ("_minimum" if has_minimum else "")
    return ir.Function("tokopt", name, graph=body.graph([flat], opset), attributes=[])


def expand_embeddings(graph: ir.Graph) -> None:
    """Gather from tables in float32 again, in place, for engines that take no codes."""
    for node in list(graph):
        if node.domain != "tokopt" or not node.op_type.startswith(GATHER):
            continue
        bits = int(node.op_type.removeprefix(f"{GATHER}_")[0])
        codes, scale, ids, *minimum = node.inputs
        numbers, steps = array(codes), array(scale).astype(np.float32)
        if bits == 4:
            numbers = np.stack([numbers & 15, numbers >> 4], axis=-1)
        low = array(minimum[0]).astype(np.float32) if minimum else -np.float32(1 << (bits - 1)) * steps
        grouped = numbers.reshape(*steps.shape, -1) * steps[..., None] + low[..., None]
        table = put_initializer(graph, f"{node.outputs[0].name}_table", grouped.reshape(len(steps), -1))
        gather = ir.node("Gather", [table, ids], attributes={"axis": 0})
        _replace(graph, node, gather)


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    new.metadata_props.update(old.metadata_props)
    new.outputs[0].type, new.outputs[0].shape = old.outputs[0].type, old.outputs[0].shape
    graph.insert_before(old, new)
    take_over(new.outputs[0], old.outputs[0])
    graph.remove(old, safe=True)
