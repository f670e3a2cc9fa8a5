"""A step for a server that batches sequences: everything that goes in and comes out has one row per sequence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from tokopt.lower.onnx.weights import put_initializer, take_over
from tokopt.runtime.format.signature import Tensor

LAST = -1
"""The token whose logits are wanted, for all sequences alike."""


def write_sequence_step(
    source: Path, target: Path, states: Mapping[str, str], rows: Tensor | None
) -> ir.Model:
    """Write the ONNX file of a step at ``source`` to ``target`` and return what was written.

    The input ``rows`` is fixed to the last token. Of ``states`` (input -> output) those that are one number per
    sequence, [batch], become [batch, 1], since a server describes shapes without their batch and knows no empty shape.
    """
    model = ir.load(source)
    inputs, outputs = (
        {value.name: value for value in side} for side in (model.graph.inputs, model.graph.outputs)
    )
    if rows is not None:
        _fix_rows(model.graph, inputs[rows.name], rows)
    for name, output in states.items():
        if len(inputs[name].shape or ()) == 1:
            _widen(model.graph, inputs[name], outputs[output])
    ir.save(model, target)
    return model


def weight_files(model: ir.Model) -> set[str]:
    """The files beside a model that its weights lie in."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


def _fix_rows(graph: ir.Graph, rows: ir.Value, described: Tensor) -> None:
    """Make the input an initializer, and its axis 1."""
    graph.inputs.remove(rows)
    rows.const_value = ir.Tensor(np.array([LAST]), name=described.name)
    graph.register_initializer(rows)
    for value in (rows, *graph.outputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([1 if dim == described.axes[0] else dim for dim in value.shape])


def _widen(graph: ir.Graph, given: ir.Value, made: ir.Value) -> None:
    """Give a state an axis of 1 after its batch, of which the nodes in between see nothing."""
    wide = ir.Shape(["batch", 1])
    axis = put_initializer(graph, "after_batch", np.array([1]))
    squeeze, unsqueeze = ir.node("Squeeze", [given, axis]), ir.node("Unsqueeze", [made, axis])
    graph.insert_before(graph[0], squeeze)
    graph.append(unsqueeze)
    for node in (squeeze, unsqueeze):
        value = node.inputs[0]
        assert value is not None
        node.outputs[0].type = value.type
        take_over(node.outputs[0], value)
        node.replace_input_with(0, value)
    squeeze.outputs[0].shape, given.shape, unsqueeze.outputs[0].shape = given.shape, wide, wide
