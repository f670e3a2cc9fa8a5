"""Calls of a function of the domain ``tokopt`` that become calls of an op of ``tokopt.cpu``, with the same body."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.serde import deserialize_function
from onnxscript import OnnxFunction

from tokopt.kernels.cpu import DOMAIN
from tokopt.lower.onnx.weights import take_over


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
