"""Draws of tokens as one ``tokopt.cpu::DrawTokens``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.serde import deserialize_function

from tokopt.kernels.cpu import DOMAIN
from tokopt.kernels.draw_tokens.onnx import draw_tokens
from tokopt.lower.onnx.nodes import input_at
from tokopt.lower.onnx.rule import Candidate, Rule, Unfit
from tokopt.lower.onnx.weights import take_over

OP = "DrawTokens"


class DrawTokens(Rule[ir.Node]):
    """``draw_tokens`` of float32 logits; the log-probabilities are an output where something reads them."""

    name: ClassVar[str] = "draws of tokens as one op of tokopt's CPU kernels"

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every draw."""
        for node in list(graph):
            if node.domain == "tokopt" and node.op_type == draw_tokens.name:
                yield (node,)

    def match(self, graph: ir.Graph, candidate: Candidate) -> ir.Node:
        """The draw."""
        (node,) = candidate
        if input_at(node, 0).dtype not in (ir.DataType.FLOAT, None):
            raise Unfit("its logits are not float32")
        return node

    def fuse(self, graph: ir.Graph, site: ir.Node) -> None:
        """One node, whose body the file holds."""
        logprobs = site.outputs[1]
        count = 2 if logprobs.uses() or logprobs.is_graph_output() else 1
        body = _body(count, self.model.opset_imports[""])
        self.model.functions.setdefault(body.identifier(), body)
        node = ir.node(OP, site.inputs, domain=DOMAIN, overload=body.overload, num_outputs=count)
        node.metadata_props.update(site.metadata_props)
        graph.insert_before(site, node)
        for new, old in zip(node.outputs, site.outputs, strict=False):
            new.type, new.shape = old.type, old.shape
            take_over(new, old)


def _body(outputs: int, opset: int) -> ir.Function:
    """What the op with so many outputs computes, in functions of standard ops."""
    form = draw_tokens.to_function_proto()
    form.domain, form.name, form.overload = DOMAIN, OP, "" if outputs == 2 else "token"
    del form.output[outputs:]
    body = deserialize_function(form)
    body.opset_imports[""] = opset
    return body
