"""Random numbers as one ``tokopt.cpu::Uniforms``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from tokopt.kernels.uniforms.onnx import uniforms
from tokopt.lower.cpu.functions import body_of, call
from tokopt.lower.onnx.rule import Candidate, Rule

OP = "Uniforms"


class Uniforms(Rule[ir.Node]):
    """``uniforms``, whose arguments are the op's."""

    name: ClassVar[str] = "random numbers as one op of tokopt's CPU kernels"

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every call."""
        for node in list(graph):
            if node.domain == "tokopt" and node.op_type == uniforms.name:
                yield (node,)

    def match(self, graph: ir.Graph, candidate: Candidate) -> ir.Node:
        """The call."""
        (node,) = candidate
        return node

    def fuse(self, graph: ir.Graph, site: ir.Node) -> None:
        """One node, whose body the file holds."""
        call(self.model, site, body_of(uniforms, OP, self.model.opset_imports[""]))
