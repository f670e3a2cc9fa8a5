"""Embeddings whose table is quantized: rows of codes are gathered and then expanded, and never the whole table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from tokopt.lower.onnx.expand import LAST, Body
from tokopt.lower.onnx.nodes import array, discard, input_at
from tokopt.lower.onnx.rule import Candidate, Rule, Unfit
from tokopt.lower.onnx.storage import narrowed
from tokopt.lower.onnx.weights import put_initializer, take_over

GATHER = "gather_weight"
"""The function, whose name goes on with the bits of the codes."""


@dataclass(frozen=True)
class Table:
    """What expands a table: ``(codes - zero) * scale``, or ``codes * scale + minimum`` where zero is 0."""

    node: ir.Node
    minimum: ir.Value | None

    @classmethod
    def of(cls, value: ir.Value) -> Table | None:
        """The table that ``value`` is; None where it is not made of codes."""
        node, minimum = value.producer(), None
        if node is not None and node.op_type == "Reshape" and not node.domain:
            total = input_at(node, 0).producer()
            if total is None or total.op_type != "Add" or total.domain:
                return None
            steps, minimum = input_at(total, 0).producer(), input_at(total, 1)
            if steps is None or steps.op_type != "Reshape" or steps.domain:
                return None
            node = input_at(steps, 0).producer()
        if node is None or (node.domain, node.op_type) != ("tokopt", "dequantize_weight"):
            return None
        return cls(node, minimum)

    def operands(self) -> list[ir.Value]:
        """Codes, scale and zero [rows, ...], and the minimum [rows, blocks, 1] where there is one."""
        return [input_at(self.node, place) for place in range(3)] + ([self.minimum] if self.minimum else [])


@dataclass(frozen=True)
class _Site:
    """An embedding, its table, and the bits of the codes."""

    gather: ir.Node
    table: Table
    bits: int


class GatherCodes(Rule[_Site]):
    """``Gather(table, ids)`` of a quantized table as what gathers rows of codes and expands these.

    Engines would expand the whole table in every run, or hold it in float. A tied head has the same codes, which the
    file of weights holds once.
    """

    name: ClassVar[str] = "embeddings gathered from codes"

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every embedding whose table is made of codes."""
        for node in list(graph):
            if node.op_type == "Gather" and not node.domain and Table.of(input_at(node, 0)) is not None:
                yield (node,)

    def match(self, graph: ir.Graph, candidate: Candidate) -> _Site:
        """The parts of the table, where they are constants that the function takes."""
        (gather,) = candidate
        table = Table.of(input_at(gather, 0))
        assert table is not None
        if gather.attributes.get_int("axis", 0) or any(one.const_value is None for one in table.operands()):
            raise Unfit("it gathers no rows of a constant table")
        codes, _, zero = map(array, table.node.inputs)
        bits = 4 if codes.max(initial=0) < 16 else 8
        if (zero != (1 << (bits - 1) if table.minimum is None else 0)).any():
            raise Unfit("its zero points are not half the range")
        return _Site(gather, table, bits)

    def fuse(self, graph: ir.Graph, site: _Site) -> None:
        """A call of the function, whose body the file holds."""
        gather, before = site.gather, input_at(site.gather, 0)
        codes, scale, _, *minimum = site.table.operands()
        given = [
            put_initializer(graph, f"{codes.name}_rows", _bytes(array(codes), site.bits)),
            _narrow(graph, scale),
            input_at(gather, 1),
            *(_narrow(graph, one) for one in minimum),
        ]
        body = _body(site.bits, bool(minimum), self.model.opset_imports[""])
        self.model.functions.setdefault(body.identifier(), body)
        _replace(graph, gather, ir.node(body.name, given, domain=body.domain))
        discard(graph, before)


def _bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [rows, channels] as they are stored: of 4 bits two in a byte, the low one first."""
    return codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4


def _narrow(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A constant [rows, blocks] or [rows, blocks, 1] as [rows, blocks], in float16 where that is exact."""
    numbers = array(value)
    numbers = numbers.reshape(numbers.shape[:2])
    half = narrowed(numbers)
    return put_initializer(graph, f"{value.name}_rows", numbers if half is None else half)


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
