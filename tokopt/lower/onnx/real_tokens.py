"""Where no token can be padding, the ops that look for it take a form that does not."""

from __future__ import annotations

import onnx_ir as ir

from tokopt.kernels import OPS

FORMS = {name: op.real_form for name, op in OPS.items() if op.real_form}
"""Function of the domain ``tokopt`` -> the same for sizes that are all positive."""

KEEPING = ("Cast", "Expand", "Gather", "GatherElements", "Identity", "Reshape", "Slice", "Unsqueeze")
"""Standard operators whose result is made of numbers of their first operand."""


def assume_real_tokens(model: ir.Model) -> None:
    """Rename the nodes of :data:`FORMS` whose sizes are proved to be positive, in place."""
    for node in model.graph:
        if node.domain == "tokopt" and node.op_type in FORMS and _positive(node.inputs[1]):
            node.op_type = FORMS[node.op_type]


def plain_name(node: ir.Node) -> str:
    """The name of the op that a node computes, whichever form it has."""
    return next((op for op, form in FORMS.items() if form == node.op_type), node.op_type)


def _positive(size: ir.Value | None) -> bool:
    """Whether every number of a tensor is greater than 0, by what made it."""
    if size is None:
        return False
    if size.const_value is not None:
        return bool((size.const_value.numpy() > 0).all())
    maker = size.producer()
    if maker is None:
        return False
    if maker.domain == "tokopt":
        pairs = OPS[maker.op_type].positive if maker.op_type in OPS else ()
        return any(size is maker.outputs[made] and _positive(maker.inputs[given]) for made, given in pairs)
    if maker.op_type == "ConstantOfShape":
        value = maker.attributes.get("value")
        return value is not None and bool((value.as_tensor().numpy() > 0).all())
    return maker.op_type in KEEPING and _positive(maker.inputs[0])
