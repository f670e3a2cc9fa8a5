"""Products of activations and weights in 8 bits as one ``tokopt.cpu::Int8Linear``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from tokopt.kernels.cpu import DOMAIN
from tokopt.lower.cpu.int8_body import NAME, body
from tokopt.lower.onnx.nodes import array, input_at, maker, only_reader
from tokopt.lower.onnx.rule import Candidate, Rule, Unfit
from tokopt.lower.onnx.storage import added_to, is_blocks, is_product
from tokopt.lower.onnx.weights import take_over

MIDDLE = 128
"""The code of 0: half the range of a byte."""

MOST_INPUTS = 65536
"""Sums of that many products of bytes fit into 32 bits."""

GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
"""``approximate`` of ``Gelu`` -> the op's activation."""


@dataclass(frozen=True)
class _Grid:
    """What all numbers of a tensor are rounded to; ``zero`` is the code of 0, 0 to 255."""

    step: float
    zero: int


@dataclass(frozen=True)
class _Site:
    """One product of bytes, and what follows it; ``end`` is the node whose result the op gives.

    Without a ``grid``, every row of ``x`` has a step of its own.
    """

    product: ir.Node
    end: ir.Node
    x: ir.Value
    grid: _Grid | None
    bias: ir.Value | None = None
    activation: str = ""


class Int8Linear(Rule[_Site]):
    """``x @ w`` of rounded ``x`` and a weight with a scale per output, its bias, and GELU."""

    name: ClassVar[str] = "products of activations and weights in 8 bits as one op of tokopt's CPU kernels"

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every product with a quantized weight that has no blocks."""
        for node in list(graph):
            weight = input_at(node, 1).producer() if is_product(node) else None
            if (
                weight is not None
                and weight.op_type == "DequantizeLinear"
                and not weight.domain
                and not is_blocks(weight)
            ):
                yield (node,)

    def match(self, graph: ir.Graph, candidate: Candidate) -> _Site:
        """What is rounded, and what follows the product."""
        (product,) = candidate
        _check_weight(product)
        rounded = input_at(product, 0).producer()
        if rounded is None or (rounded.op_type, rounded.domain) != ("fake_quantize", "tokopt"):
            raise Unfit("what it multiplies is not rounded to 8 bits")
        x = input_at(rounded, 0)
        if x.dtype not in (ir.DataType.FLOAT, None):
            raise Unfit("what it multiplies is not float32")
        site = _by_row(product, x)
        if site is None:
            zero = rounded.attributes["zero"].as_int() + MIDDLE
            site = _Site(product, product, x, _Grid(rounded.attributes["scale"].as_float(), zero))
        outputs = _outputs(product)
        for total, other in added_to(site.end):
            if other.const_value is not None and list(other.const_value.shape) == [outputs]:
                site = replace(site, end=total, bias=other)
            break
        gelu = only_reader(site.end.outputs[0], "Gelu")
        if gelu is None:
            return site
        return replace(site, end=gelu, activation=GELUS[gelu.attributes.get_string("approximate", "none")])

    def fuse(self, graph: ir.Graph, site: _Site) -> None:
        """One node, whose body the file holds."""
        codes, scale = maker(input_at(site.product, 1)).inputs[:2]
        attributes: dict[str, float | int | str] = {}
        if site.grid is not None:
            attributes |= {"step": site.grid.step, "zero": site.grid.zero}
        if site.activation:
            attributes["activation"] = site.activation
        made = body(attributes, site.bias is not None, self.model.opset_imports[""])
        self.model.functions.setdefault(made.identifier(), made)
        given = [site.x, codes, scale] + ([site.bias] if site.bias is not None else [])
        node = ir.node(NAME, given, attributes=attributes, domain=DOMAIN, overload=made.overload)
        node.metadata_props.update(site.product.metadata_props)
        new, old = node.outputs[0], site.end.outputs[0]
        new.type, new.shape = old.type, old.shape
        # In the order in which the program rounds, whatever reads it first.
        graph.insert_before(maker(input_at(site.product, 0)), node)
        take_over(new, old)


def _outputs(product: ir.Node) -> int:
    return int(array(input_at(maker(input_at(product, 1)), 1)).shape[0])


def _check_weight(product: ir.Node) -> None:
    """Raise Unfit unless the weight is bytes [in, out] around 128 with a scale per output."""
    node = maker(input_at(product, 1))
    if len(node.inputs) < 3 or any(value is None or value.const_value is None for value in node.inputs):
        raise Unfit("its weight is computed, or has codes with signs")
    codes, scale, zero = (input_at(node, place) for place in range(3))
    assert codes.const_value is not None and scale.const_value is not None
    size = tuple(codes.const_value.shape.numpy())
    if (
        codes.dtype != ir.DataType.UINT8
        or len(size) != 2
        or node.attributes.get_int("axis", 1) not in (1, -1)
    ):
        raise Unfit("its weight is no matrix of bytes with a scale per output")
    if scale.dtype != ir.DataType.FLOAT or tuple(scale.const_value.shape.numpy()) != size[1:]:
        raise Unfit("its weight has no float32 scale per output")
    if (array(zero) != MIDDLE).any():
        raise Unfit("its weight has zero points other than 128")
    if size[0] > MOST_INPUTS:
        raise Unfit(f"its weight has more than {MOST_INPUTS} inputs, whose sums may not fit into 32 bits")


def _by_row(product: ir.Node, ratio: ir.Value) -> _Site | None:
    """``round(x / step) @ w * step`` with ``step = max(max|x| / 127, 1e-30)`` of every row; None for others."""
    division = _of(ratio, "Div")
    if division is None:
        return None
    x, step = input_at(division, 0), input_at(division, 1)
    scaled = only_reader(product.outputs[0], "Mul")
    if scaled is None or step not in scaled.inputs or not _is_step(step, x):
        return None
    return _Site(product, scaled, x, None)


def _is_step(step: ir.Value, x: ir.Value) -> bool:
    clip = _of(step, "Clip")
    share = _of(input_at(clip, 0), "Div") if clip is not None and len(clip.inputs) == 2 else None
    most = _of(input_at(share, 0), "ReduceMax") if share is not None else None
    magnitude = _of(input_at(most, 0), "Abs") if most is not None and len(most.inputs) == 2 else None
    if clip is None or share is None or most is None or magnitude is None:
        return False
    return (
        magnitude.inputs[0] is x
        and bool(most.attributes.get_int("keepdims", 1))
        and _is(input_at(most, 1), -1)
        and _is(input_at(share, 1), 127)
        and _is(input_at(clip, 1), 1e-30)
    )


def _of(value: ir.Value, operation: str) -> ir.Node | None:
    """The node of that operation that computes a value."""
    node = value.producer()
    return node if node is not None and node.op_type == operation and not node.domain else None


def _is(value: ir.Value, number: float) -> bool:
    """Whether a value is a constant, this number alone."""
    if value.const_value is None:
        return False
    numbers = array(value)
    return numbers.size == 1 and bool((numbers == np.asarray(number, numbers.dtype)).all())
