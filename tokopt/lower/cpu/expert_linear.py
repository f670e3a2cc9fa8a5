"""Products with the weights of chosen experts as one op: in blocks of 4 or 8 bits ``tokopt.cpu::ExpertLinear``, in
float32 ``tokopt.cpu::FloatExpertLinear``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from tokopt.lower.cpu.bodies import (
    EXPERT_INPUTS,
    FLOAT_EXPERT_INPUTS,
    Follows,
    expert_linear,
    float_expert_linear,
)
from tokopt.lower.cpu.gate import gate_of
from tokopt.lower.cpu.quantized_linear import fitting_blocks
from tokopt.lower.onnx.nodes import array, input_at, only_reader, other_input, reader_alone
from tokopt.lower.onnx.rule import Candidate, Rule, Unfit
from tokopt.lower.onnx.storage import Blocks, as_stored, is_product, stored_bytes
from tokopt.lower.onnx.weights import put_initializer, take_over


@dataclass(frozen=True)
class _Product:
    """A product of ``x`` with chosen experts, and what follows it.

    ``end`` is the node whose result the op gives. Where there is none, ``gate`` is empty, and ``bias`` [experts, out]
    and ``share`` are None.
    """

    x: ir.Value
    chosen: ir.Value
    end: ir.Node
    bias: ir.Value | None
    gate: str
    share: ir.Value | None

    @property
    def flat(self) -> bool:
        """Whether ``x`` is [tokens, in], and not [tokens, k or 1, in]."""
        return self.x.shape is not None and len(self.x.shape) == 2

    @property
    def follows(self) -> Follows:
        """What a body of the op has to know."""
        return Follows(self.bias is not None, self.gate, self.share is not None)


@dataclass(frozen=True)
class _OfBlocks:
    """A product with all experts of which the chosen ones are ``taken``."""

    product: _Product
    taken: ir.Node
    blocks: Blocks


class ExpertLinear(Rule[_OfBlocks]):
    """The product, what takes the chosen experts' part, the gate that follows, or the sum by the experts' shares."""

    name: ClassVar[str] = "products with experts' weights in blocks as one op of tokopt's CPU kernels"

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every product of which experts are taken."""
        yield from _calls(graph, "take_expert")

    def match(self, graph: ir.Graph, candidate: Candidate) -> _OfBlocks:
        """The parts of the weight, and what becomes of the product."""
        (taken,) = candidate
        every = input_at(taken, 0)
        product = every.producer()
        if product is None or not is_product(product) or reader_alone(every) is not taken:
            raise Unfit("what all experts made is read by something else, too")
        return _OfBlocks(_product(input_at(product, 0), taken), taken, fitting_blocks(product))

    def fuse(self, graph: ir.Graph, site: _OfBlocks) -> None:
        """One node, whose body the file holds."""
        blocks, product = site.blocks, site.product
        weight = {"codes": stored_bytes(graph, blocks), "scale": as_stored(blocks.scale)}
        if not blocks.symmetric:
            weight["zero"] = put_initializer(graph, f"{blocks.zero.name}_bytes", blocks.zeros())
        if product.bias is not None:
            weight["bias"] = put_initializer(
                graph, f"{product.bias.name}_flat", array(product.bias).reshape(-1)
            )
        version = self.model.opset_imports[""]
        body = expert_linear(blocks.bits, product.follows, version, zero="zero" in weight, flat=product.flat)
        experts = site.taken.attributes["experts"].as_int()
        attributes = {"bits": blocks.bits, "group": blocks.group, "experts": experts}
        node = _node(body, product, dict.fromkeys(EXPERT_INPUTS) | weight, attributes)
        node.metadata_props.update(site.taken.metadata_props)
        _put(self.model, body, node, product.end)


@dataclass(frozen=True)
class _OfFloats:
    """A call of ``expert_linear``."""

    product: _Product
    call: ir.Node


class FloatExpertLinear(Rule[_OfFloats]):
    """The product with the chosen experts, the gate that follows, or the sum by the experts' shares."""

    name: ClassVar[str] = "products with experts' weights in float32 as one op of tokopt's CPU kernels"

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every product with chosen experts."""
        yield from _calls(graph, "expert_linear")

    def match(self, graph: ir.Graph, candidate: Candidate) -> _OfFloats:
        """What becomes of the product, whose weight is a constant [experts, in, out]."""
        (call,) = candidate
        weight = input_at(call, 2)
        if weight.const_value is None:
            raise Unfit("its weight is not constant")
        if weight.dtype != ir.DataType.FLOAT:
            raise Unfit("its weight is not float32")
        return _OfFloats(_product(input_at(call, 0), call), call)

    def fuse(self, graph: ir.Graph, site: _OfFloats) -> None:
        """One node, whose body the file holds."""
        product = site.product
        body = float_expert_linear(product.follows, self.model.opset_imports[""], flat=product.flat)
        weight = {"weight": input_at(site.call, 2), "bias": product.bias}
        node = _node(body, product, dict.fromkeys(FLOAT_EXPERT_INPUTS) | weight, {})
        node.metadata_props.update(site.call.metadata_props)
        _put(self.model, body, node, product.end)


def _calls(graph: ir.Graph, function: str) -> Iterator[Candidate]:
    """The nodes that call a function of the domain ``tokopt``."""
    for node in list(graph):
        if node.domain == "tokopt" and node.op_type == function:
            yield (node,)


def _product(x: ir.Value, made: ir.Node) -> _Product:
    """The product of ``x`` that ``made`` is the result of, and what follows it."""
    x, chosen = _rows(x), input_at(made, 1)
    made, bias = _biased(made, chosen) or (made, None)
    gate = gate_of(made)
    if gate is not None:
        return _Product(x, chosen, gate.end, bias, gate.activation, None)
    end, share = _summed(made, chosen) or (made, None)
    return _Product(x, chosen, end, bias, "", share)


def _node(
    body: ir.Function,
    product: _Product,
    inputs: Mapping[str, ir.Value | None],
    attributes: Mapping[str, int],
) -> ir.Node:
    """A call of the op; ``inputs`` are all that it has, in their order, of which the weight's are known."""
    given = {**inputs, "x": product.x, "chosen": product.chosen, "share": product.share}
    own = {**attributes, **({"gate": product.gate} if product.gate else {})}
    return ir.node(
        body.name, list(given.values()), attributes=own, domain=body.domain, overload=body.overload
    )


def _put(model: ir.Model, body: ir.Function, node: ir.Node, end: ir.Node) -> None:
    """Put ``node`` in the place of the result of ``end``; the model gets its body."""
    model.functions.setdefault(body.identifier(), body)
    made, old = node.outputs[0], end.outputs[0]
    made.type, made.shape = old.type, old.shape
    model.graph.insert_before(end, node)
    take_over(made, old)


def _rows(x: ir.Value) -> ir.Value:
    """The rows [tokens, in] that ``x`` [tokens, 1, in] is a view of: the kernel takes either."""
    view = x.producer()
    if view is None or view.domain or view.op_type not in ("Unsqueeze", "Reshape"):
        return x
    given = input_at(view, 0)
    if given.shape is None or x.shape is None or (len(given.shape), len(x.shape)) != (2, 3):
        return x
    return given if x.shape[1] == 1 and given.shape[1] == x.shape[2] else x


def _biased(product: ir.Node, chosen: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """What adds to a product the biases [experts, out] of the ``chosen`` experts; None where nothing does.

    It is ``where(chosen < experts, product + bias[min(chosen, experts - 1)], 0)``. A negative number is no expert for
    the op, where this adds a bias: what comes from a top-k is none.
    """
    total = only_reader(product.outputs[0], "Add")
    end = only_reader(total.outputs[0], "Where") if total is not None else None
    if total is None or end is None or end.inputs[1] is not total.outputs[0]:
        return None
    own = other_input(total, product.outputs[0]).producer()
    if own is None or own.op_type != "GatherND" or own.attributes.get_int("batch_dims", 0):
        return None
    bias = input_at(own, 0)
    if bias.const_value is None or bias.const_value.shape.rank() != 2 or bias.dtype != ir.DataType.FLOAT:
        return None
    experts = len(array(bias))
    least, below = _wide(own, 1, "Clip"), _wide(end, 0, "Less")
    if least is None or below is None or len(least.inputs) != 3 or least.inputs[1] is not None:
        return None
    if least.inputs[0] is not chosen or below.inputs[0] is not chosen:
        return None
    numbers = {(least, 2): experts - 1, (below, 1): experts, (end, 2): 0}
    return (end, bias) if all(_is_number(*place, number) for place, number in numbers.items()) else None


def _wide(node: ir.Node, place: int, operation: str) -> ir.Node | None:
    """The ``operation`` that makes what a node reads at ``place`` with one more axis; None for anything else."""
    view = input_at(node, place).producer()
    maker = input_at(view, 0).producer() if view is not None and view.op_type == "Unsqueeze" else None
    return maker if maker is not None and maker.op_type == operation and not maker.domain else None


def _is_number(node: ir.Node, place: int, number: float) -> bool:
    """Whether what a node reads at ``place`` is a constant of this number alone."""
    value = input_at(node, place)
    return value.const_value is not None and bool((array(value) == number).all())


def _summed(product: ir.Node, chosen: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """The sum over a token's experts of what they made times their shares [tokens, k]; None where there is none."""
    made = product.outputs[0]
    scaled = only_reader(made, "Mul")
    if scaled is None:
        return None
    wide = other_input(scaled, made)
    view = wide.producer()
    total = only_reader(scaled.outputs[0], "ReduceSum")
    if view is None or total is None or view.op_type not in ("Unsqueeze", "Reshape") or view.domain:
        return None
    share = input_at(view, 0)
    if share.shape is None or wide.shape is None or share.dtype != ir.DataType.FLOAT:
        return None
    if (len(share.shape), len(wide.shape)) != (2, 3) or wide.shape[2] != 1 or share.shape != chosen.shape:
        return None
    axes = input_at(total, 1) if len(total.inputs) > 1 else None
    along = axes is not None and axes.const_value is not None and array(axes).tolist() == [1]
    return (total, share) if along and not total.attributes.get_int("keepdims", 1) else None
