"""Small questions about ONNX nodes and values."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def input_at(node: ir.Node, place: int) -> ir.Value:
    """The input at ``place`` of a node that has one there."""
    given = node.inputs[place]
    assert given is not None, f"input {place} of {node.name} is left out"
    return given


def maker(value: ir.Value) -> ir.Node:
    """The node that computes a value which is neither an input nor an initializer."""
    node = value.producer()
    assert node is not None, f"no node computes {value.name}"
    return node


def array(value: ir.Value | None) -> np.ndarray:
    """The elements of a constant."""
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()
