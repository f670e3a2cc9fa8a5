"""Products with weights in blocks of 4 or 8 bits as one ``tokopt.cpu::QuantizedLinear``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from tokopt.kernels.cpu import DOMAIN
from tokopt.lower.cpu.bodies import INPUTS, OP, overload, quantized_linear
from tokopt.lower.cpu.gate import gate_of
from tokopt.lower.onnx.nodes import array, input_at
from tokopt.lower.onnx.rule import Candidate, Rule, Unfit
from tokopt.lower.onnx.storage import (
    Blocks,
    Offset,
    added_to,
    as_stored,
    blocks_of,
    is_blocks,
    is_product,
    minimum_of,
    offset_of,
    stored_bytes,
)
from tokopt.lower.onnx.weights import put_initializer, take_over

GROUPS = (32, 64, 128)
"""Inputs that may share a scale."""


@dataclass(frozen=True)
class _Site:
    """One product with a weight in blocks, and what follows it.

    ``end`` is the node whose result the op gives; ``offset`` and ``bias`` are None and ``gate`` is empty where there is
    none.
    """

    product: ir.Node
    end: ir.Node
    blocks: Blocks
    offset: Offset | None
    bias: ir.Value | None
    gate: str


def fitting_blocks(product: ir.Node) -> Blocks:
    """The blocks of a product's weight, as the kernels multiply with them; raises Unfit."""
    made = input_at(product, 1).producer()
    blocks = blocks_of(made) if made is not None else None
    if blocks is None:
        raise Unfit("its weight is not constant")
    if blocks.group not in GROUPS:
        raise Unfit(f"its weight has blocks of {blocks.group}, not of 32, 64 or 128")
    if input_at(product, 0).dtype not in (ir.DataType.FLOAT, None):
        raise Unfit("what it multiplies is not float32")
    return blocks


class QuantizedLinear(Rule[_Site]):
    """``x @ w``, the offsets of its blocks, the bias, and the activation by which one half of it gates the other."""

    name: ClassVar[str] = "products with weights in blocks as one op of tokopt's CPU kernels"

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every product with a weight in blocks."""
        for node in list(graph):
            weight = input_at(node, 1).producer() if is_product(node) else None
            if weight is not None and is_blocks(weight):
                yield (node,)

    def match(self, graph: ir.Graph, candidate: Candidate) -> _Site:
        """The parts of the weight, and what is added to the product."""
        (product,) = candidate
        blocks = fitting_blocks(product)
        end, taken, bias = product, None, None
        offset = offset_of(product) if blocks.symmetric else None
        for total, other in added_to(product):
            if offset is not None and total is offset.total and _is_known(offset):
                end, taken = total, offset
            elif bias is None and _is_bias(other, blocks):
                end, bias = total, other
            else:
                break
        gate = gate_of(end)
        if gate is None:
            return _Site(product, end, blocks, taken, bias, "")
        return _Site(product, gate.end, blocks, taken, bias, gate.activation)

    def fuse(self, graph: ir.Graph, site: _Site) -> None:
        """One node, whose body the file holds."""
        blocks, scale = site.blocks, as_stored(site.blocks.scale)
        given: dict[str, ir.Value] = {
            "x": input_at(site.product, 0),
            "codes": stored_bytes(graph, blocks),
            "scale": scale,
        }
        if site.offset is not None:
            given["minimum"] = minimum = _minimum(graph, site.offset)
            if minimum.dtype != scale.dtype:  # the kernel takes both in one dtype
                given |= {name: _wide(graph, given[name]) for name in ("scale", "minimum")}
        elif not blocks.symmetric:
            given["zero"] = put_initializer(graph, f"{blocks.zero.name}_bytes", blocks.zeros())
        if site.bias is not None:
            given["bias"] = site.bias
        node = self._node(given, blocks, site.gate)
        node.metadata_props.update(site.product.metadata_props)
        made, old = node.outputs[0], site.end.outputs[0]
        made.type, made.shape = old.type, old.shape
        graph.insert_before(site.end, node)
        take_over(made, old)

    def _node(self, given: Mapping[str, ir.Value], blocks: Blocks, gate: str) -> ir.Node:
        """The op, after its body is in the model."""
        optional = [name for name in INPUTS[3:] if name in given]
        version = self.model.opset_imports[""]
        body = quantized_linear(blocks.bits, optional, version, gate)
        self.model.functions.setdefault(body.identifier(), body)
        return ir.node(
            OP,
            [given.get(name) for name in INPUTS],
            attributes={"bits": blocks.bits, "group": blocks.group} | ({"gate": gate} if gate else {}),
            domain=DOMAIN,
            overload=overload(blocks.bits, optional, gate),
        )


def _is_known(offset: Offset) -> bool:
    """Whether the minima of a weight are stored, or follow from a constant table."""
    return minimum_of(offset) is not None or offset.table.const_value is not None


def _minimum(graph: ir.Graph, offset: Offset) -> ir.Value:
    """What a weight's codes of 0 stand for [out, in / group]."""
    if (stored := minimum_of(offset)) is not None:
        return stored
    blocks = offset.blocks
    offsets = array(offset.table).T / np.float32(blocks.group)
    return put_initializer(
        graph, f"{blocks.codes.name}_minimum", offsets - np.float32(blocks.middle) * blocks.scales()
    )


def _is_bias(value: ir.Value, blocks: Blocks) -> bool:
    """Whether a value is a constant [out]."""
    return value.const_value is not None and list(value.const_value.shape) == [blocks.outputs]


def _wide(graph: ir.Graph, value: ir.Value) -> ir.Value:
    return put_initializer(graph, f"{value.name}_wide", array(value).astype(np.float32))
