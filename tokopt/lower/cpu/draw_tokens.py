"""Draws of tokens as one ``tokopt.cpu::DrawTokens``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from tokopt.kernels.draw_tokens.onnx import draw_tokens
from tokopt.lower.cpu.functions import body_of, call
from tokopt.lower.onnx.nodes import input_at
from tokopt.lower.onnx.rule import Candidate, Rule, Unfit

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
        body = body_of(draw_tokens, OP, self.model.opset_imports[""])
        logprobs = site.outputs[1]
        if not (logprobs.uses() or logprobs.is_graph_output()):
            body.outputs.pop()
            body.overload = "token"
        call(self.model, site, body)
