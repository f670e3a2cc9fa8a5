"""Calls of a function of the domain ``tokopt`` that become calls of an op of ``tokopt.cpu``, with the same body."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.serde import deserialize_function
from onnxscript import OnnxFunction

from tokopt.kernels.cpu import DOMAIN
from tokopt.lower.onnx.rule import Candidate, Rule
from tokopt.lower.onnx.weights import take_over


class WholeCall(Rule[ir.Node]):
    """Every call of ``function`` becomes a call of ``op``, which has the same arguments."""

    op: ClassVar[str]
    function: ClassVar[OnnxFunction]

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every call."""
        for node in list(graph):
            if node.domain == "tokopt" and node.op_type == self.function.name:
                yield (node,)

    def match(self, graph: ir.Graph, candidate: Candidate) -> ir.Node:
        """The call."""
        (node,) = candidate
        return node

    def fuse(self, graph: ir.Graph, site: ir.Node) -> None:
        """One node, whose body the file holds."""
        call(self.model, site, body_of(self.function, self.op, self.model.opset_imports[""]))


def body_of(function: OnnxFunction, op: str, opset: int) -> ir.Function:
    """What the op computes: what ``function`` does, in functions of standard ops."""
    form = function.to_function_proto()
    form.domain, form.name = DOMAIN, op
    body = deserialize_function(form)
    body.opset_imports[""] = opset
    return body


def call(model: ir.Model, site: ir.Node, body: ir.Function) -> None:
    """Call the op of ``body`` in place of ``site``, of whose outputs it has the first ones; the model gets the body."""
    model.functions.setdefault(body.identifier(), body)
    node = ir.node(
        body.name, site.inputs, domain=DOMAIN, overload=body.overload, num_outputs=len(body.outputs)
    )
    node.metadata_props.update(site.metadata_props)
    model.graph.insert_before(site, node)
    for new, old in zip(node.outputs, site.outputs, strict=False):
        new.type, new.shape = old.type, old.shape
        take_over(new, old)
