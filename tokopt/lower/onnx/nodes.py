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


def reader_alone(value: ir.Value) -> ir.Node | None:
    """The node that alone reads a value; None where several do, or the graph gives it."""
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def only_reader(value: ir.Value, operation: str) -> ir.Node | None:
    """The node that alone reads a value, if it is of a standard operation."""
    node = reader_alone(value)
    return node if node is not None and node.op_type == operation and not node.domain else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value:
    """The other operand of an operation with two."""
    return input_at(node, 1 if node.inputs[0] is value else 0)


def discard(graph: ir.Graph, value: ir.Value | None) -> None:
    """Remove what makes a value that nothing reads any more: nodes and constants that nothing else reads.

    So the old form of a large weight leaves memory before the next weight is rewritten.
    """
    left = [value]
    while left:
        one = left.pop()
        if one is None or one.uses() or one.is_graph_output():
            continue
        node = one.producer()
        if node is None:
            if one.is_initializer():
                graph.initializers.pop(one.name or "")
        elif not any(other.uses() or other.is_graph_output() for other in node.outputs):
            left += node.inputs
            graph.remove(node, safe=True)


def array(value: ir.Value | None) -> np.ndarray:
    """The elements of a constant."""
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()
