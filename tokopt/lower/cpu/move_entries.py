"""Moves of a cache's entries as one ``tokopt.cpu::MoveEntries``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.serde import deserialize_function

from tokopt.kernels.cpu import DOMAIN
from tokopt.kernels.move_entries.onnx import move_entries
from tokopt.lower.onnx.rule import Candidate, Rule
from tokopt.lower.onnx.weights import take_over

OP = "MoveEntries"


class MoveEntries(Rule[ir.Node]):
    """``move_entries`` of caches of any dtype."""

    name: ClassVar[str] = "moves of a cache's entries as one op of tokopt's CPU kernels"

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every move."""
        for node in list(graph):
            if node.domain == "tokopt" and node.op_type == move_entries.name:
                yield (node,)

    def match(self, graph: ir.Graph, candidate: Candidate) -> ir.Node:
        """The move."""
        (node,) = candidate
        return node

    def fuse(self, graph: ir.Graph, site: ir.Node) -> None:
        """One node, whose body the file holds."""
        body = _body(self.model.opset_imports[""])
        self.model.functions.setdefault(body.identifier(), body)
        node = ir.node(OP, site.inputs, domain=DOMAIN)
        node.metadata_props.update(site.metadata_props)
        graph.insert_before(site, node)
        (new,), (old,) = node.outputs, site.outputs
        new.type, new.shape = old.type, old.shape
        take_over(new, old)


def _body(opset: int) -> ir.Function:
    """What the op computes, in standard ops."""
    form = move_entries.to_function_proto()
    form.domain, form.name = DOMAIN, OP
    body = deserialize_function(form)
    body.opset_imports[""] = opset
    return body
