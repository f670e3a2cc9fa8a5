"""A graph as torch translates it, simplified by onnxscript: constants folded, norms and rotary embeddings fused."""

# What is looked up here without need takes half of onnxscript's time; it has no public way to leave it out.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.optimizer import _constant_folding as folding
from onnxscript.rewriter import RewriteRule, onnx_fusions, rewrite
from onnxscript.rewriter._pattern_ir import Constant
from onnxscript.rewriter.rules import common as rules


def _without_effect(operation: str, neutral: float) -> RewriteRule:
    """An operation with its neutral element is its operand.

    onnxscript's own rules also take what is close to it: they drop the epsilon that keeps a division from zero.
    """
    element = Constant(neutral, rel_tol=0.0, abs_tol=0.0)
    return RewriteRule(lambda op, x: getattr(op, operation)(x, element), lambda op, x: op.Identity(x))


RULES: Mapping[str, tuple[RewriteRule, ...]] = {
    "Add": (_without_effect("Add", 0.0),),
    "Sub": (_without_effect("Sub", 0.0),),
    "Mul": (_without_effect("Mul", 1.0),),
    "Div": (_without_effect("Div", 1.0),),
    "Cast": (
        rules.cast_cast_rule,
        rules.no_op_cast_rule,
        rules.cast_constant_of_shape_rule,
        rules.cast_constant_of_shape_without_value_rule,
    ),
    "Expand": (rules.no_op_expand_rule,),
    "Transpose": (rules.no_op_transpose_rule, rules.transpose_transpose_rule),
    "Unsqueeze": (rules.unsqueeze_unsqueeze_rule,),
    "Reshape": (
        rules.squeeze_reshape_1d_rule,
        rules.reshape_reshape_rule,
        rules.materialize_reshape_shape_rule,
    ),
    "Flatten": (rules.flatten_to_reshape_rule,),
    "Slice": (rules.collapse_slice_rule, rules.collapse_slice2_rule),
    "Gemm": (rules.remove_optional_bias_from_gemm_rule,),
}
"""What onnxscript's optimizer does to transformers, by the operator at the end of each pattern.

All its rules take a time quadratic in the model's depth.
"""


def simplify(model: ir.Model) -> None:
    """Fold constants, fuse norms and rotary embeddings, drop what is dead, double, or tells of the machine."""
    for _ in range(2):
        _Folding(
            shape_inference=True,
            input_size_limit=folding.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
            output_size_limit=folding.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
        )(model)
        rewrite(model, [_ByOperator(RULES)])
    for tidy in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        tidy(model)
    onnx_fusions.fuse(model)
    passes.CommonSubexpressionEliminationPass()(model)
    scopes = {node: node.metadata_props.get("namespace") for node in model.graph}
    passes.ClearMetadataAndDocStringPass()(model)
    for node, scope in scopes.items():
        if scope:  # the module of the user's model that the node came from
            node.metadata_props["namespace"] = scope


class _Folding(folding.FoldConstantsPass):
    """onnxscript's folding, which infers no shape that is known already."""

    def _do_inference(self, node: ir.Node) -> None:
        if not all(map(_is_known, node.outputs)):
            super()._do_inference(node)


def _is_known(value: ir.Value) -> bool:
    """Whether a value has a dtype, and a number or a name for every size."""
    return (
        value.type is not None
        and value.shape is not None
        and all(isinstance(size, int) or size.value is not None for size in value.shape)
    )


class _ByOperator(RewriteRule):
    """Rules of which each is tried at its own operator: onnxscript tries every rule at every node."""

    def __init__(self, rules: Mapping[str, tuple[RewriteRule, ...]]) -> None:
        self.rules = rules
        self.name, self.remove_nodes, self.as_function = None, False, False
        self.graph_pre_visitor = self.graph_post_visitor = None

    def try_rewrite(self, model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
        """What takes the node's place by the first rule that fits, whose further wishes are then those of this one."""
        for rule in self.rules.get(node.op_type, ()):
            made = rule.try_rewrite(model, graph, node, **options)
            if made is not None:
                self.name, self.remove_nodes = rule.name, rule.remove_nodes
                return made
        return None
