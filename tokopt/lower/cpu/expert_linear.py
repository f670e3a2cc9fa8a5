"""Products with the weights of chosen experts, in blocks of 4 or 8 bits, as one ``tokopt.cpu::ExpertLinear``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from tokopt.kernels.cpu import DOMAIN
from tokopt.lower.cpu.bodies import EXPERT_INPUTS, expert_linear
from tokopt.lower.cpu.gate import gate_of
from tokopt.lower.cpu.quantized_linear import fitting_blocks
from tokopt.lower.onnx.nodes import array, input_at, only_reader, other_input, reader_alone
from tokopt.lower.onnx.rule import Candidate, Rule, Unfit
from tokopt.lower.onnx.storage import Blocks, as_stored, is_product, stored_bytes
from tokopt.lower.onnx.weights import put_initializer, take_over


@dataclass(frozen=True)
class _Site:
    """A product with all experts of which the chosen ones are ``taken``, and what follows.

    ``end`` is the node whose result the op gives; ``gate`` is empty and ``share`` None where there is none.
    """

    x: ir.Value
    taken: ir.Node
    end: ir.Node
    blocks: Blocks
    gate: str
    share: ir.Value | None


class ExpertLinear(Rule[_Site]):
    """The product, what takes the chosen experts' part, the gate that follows, or the sum by the experts' shares."""

    name: ClassVar[str] = "products with experts' weights in blocks as one op of tokopt's CPU kernels"

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every product of which experts are taken."""
        for node in list(graph):
            if node.domain == "tokopt" and node.op_type == "take_expert":
                yield (node,)

    def match(self, graph: ir.Graph, candidate: Candidate) -> _Site:
        """The parts of the weight, and what becomes of the product."""
        (taken,) = candidate
        every = input_at(taken, 0)
        product = every.producer()
        if product is None or not is_product(product) or reader_alone(every) is not taken:
            raise Unfit("what all experts made is read by something else, too")
        blocks, x = fitting_blocks(product), _rows(input_at(product, 0))
        gate = gate_of(taken)
        if gate is not None:
            return _Site(x, taken, gate.end, blocks, gate.activation, None)
        summed = _summed(taken)
        if summed is not None:
            return _Site(x, taken, summed[0], blocks, "", summed[1])
        return _Site(x, taken, taken, blocks, "", None)

    def fuse(self, graph: ir.Graph, site: _Site) -> None:
        """One node, whose body the file holds."""
        blocks = site.blocks
        given: dict[str, ir.Value] = {
            "x": site.x,
            "chosen": input_at(site.taken, 1),
            "codes": stored_bytes(graph, blocks),
            "scale": as_stored(blocks.scale),
        }
        if not blocks.symmetric:
            given["zero"] = put_initializer(graph, f"{blocks.zero.name}_bytes", blocks.zeros())
        if site.share is not None:
            given["share"] = site.share
        optional = [name for name in EXPERT_INPUTS[4:] if name in given]
        flat = site.x.shape is not None and len(site.x.shape) == 2
        version = self.model.opset_imports[""]
        body = expert_linear(blocks.bits, optional, version, site.gate, flat=flat)
        self.model.functions.setdefault(body.identifier(), body)
        attributes = {
            "bits": blocks.bits,
            "group": blocks.group,
            "experts": site.taken.attributes["experts"].as_int(),
        }
        node = ir.node(
            body.name,
            [given.get(name) for name in EXPERT_INPUTS],
            attributes=attributes | ({"gate": site.gate} if site.gate else {}),
            domain=DOMAIN,
            overload=body.overload,
        )
        node.metadata_props.update(site.taken.metadata_props)
        made, old = node.outputs[0], site.end.outputs[0]
        made.type, made.shape = old.type, old.shape
        graph.insert_before(site.end, node)
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


def _summed(taken: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The sum over a token's experts of what they made times their shares [tokens, k]; None where there is none."""
    made = taken.outputs[0]
    scaled = only_reader(made, "Mul")
    if scaled is None:
        return None
    wide = other_input(scaled, made)
    view = wide.producer()
    total = only_reader(scaled.outputs[0], "ReduceSum")
    if view is None or total is None or view.op_type not in ("Unsqueeze", "Reshape") or view.domain:
        return None
    share, chosen = input_at(view, 0), input_at(taken, 1)
    if share.shape is None or wide.shape is None or share.dtype != ir.DataType.FLOAT:
        return None
    if (len(share.shape), len(wide.shape)) != (2, 3) or wide.shape[2] != 1 or share.shape != chosen.shape:
        return None
    axes = input_at(total, 1) if len(total.inputs) > 1 else None
    along = axes is not None and axes.const_value is not None and array(axes).tolist() == [1]
    return (total, share) if along and not total.attributes.get_int("keepdims", 1) else None
