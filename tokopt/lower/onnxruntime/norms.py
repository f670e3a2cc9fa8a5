"""Residual sums and the norms after them as one node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from tokopt.lower.onnx.nodes import input_at
from tokopt.lower.onnx.rule import Candidate, Rule, Unfit
from tokopt.lower.onnx.weights import take_over
from tokopt.lower.onnxruntime.attention import CONTRIB


class NormOfSum(Rule[Candidate]):
    """``RMSNormalization(a + b)`` as one node that gives the norm and the sum."""

    name: ClassVar[str] = "a sum and the norm of it as one node"

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every norm of a sum, with the sum."""
        for node in list(graph):
            total = (
                node.inputs[0].producer() if node.op_type == "RMSNormalization" and node.inputs[0] else None
            )
            if total is not None and total.op_type == "Add" and not node.domain:
                yield (node, total)

    def match(self, graph: ir.Graph, candidate: Candidate) -> Candidate:
        """The norm and the sum."""
        norm, add = candidate
        first, second = input_at(add, 0), input_at(add, 1)
        if norm.attributes.get_int("axis", -1) != -1:
            raise Unfit("it is not over the last axis alone")
        if add.outputs[0].is_graph_output():
            raise Unfit("the sum is an output of the program")
        if first.shape is None or first.shape != second.shape or len(first.shape) != 3:
            raise Unfit("what is added is not two tensors of tokens of one shape")
        return candidate

    def fuse(self, graph: ir.Graph, site: Candidate) -> None:
        """One ``SkipSimplifiedLayerNormalization``."""
        norm, add = site
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, norm.inputs[1]],
            attributes={"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
            domain=CONTRIB,
            num_outputs=4,
        )
        fused.metadata_props.update(norm.metadata_props)
        graph.insert_before(add, fused)
        for new, old in ((fused.outputs[0], norm.outputs[0]), (fused.outputs[3], add.outputs[0])):
            new.type, new.shape = old.type, old.shape
            take_over(new, old)
