"""One half of a product's outputs, after an activation, times the other half."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from tokopt.lower.onnx.nodes import array, input_at


@dataclass(frozen=True)
class Gate:
    """``end`` multiplies the halves of a product; ``activation`` is what the first goes through before."""

    end: ir.Node
    activation: str


def gate_of(product: ir.Node) -> Gate | None:
    """The gate that alone reads the result of ``product``; None where something else does, or no activation is known.

    It is ``activation(first half) * second half``, with SiLU or GELU, exact or by tanh.
    """
    split = _only_reader(product.outputs[0])
    if split is None or not _halves(split):
        return None
    gate, up = split.outputs
    end = _only_reader(up)
    if end is None or end.op_type != "Mul" or end.domain:
        return None
    active = _other(end, up)
    maker = active.producer()
    if maker is None or _only_reader(active) is not end:
        return None
    activation = _activation(maker, gate)
    return None if activation is None else Gate(end, activation)


def _activation(maker: ir.Node, gate: ir.Value) -> str | None:
    """The name of what ``maker`` makes of ``gate``, if nothing else reads ``gate``."""
    if maker.domain:
        return None
    readers = {use.node for use in gate.uses()}
    if maker.op_type == "Gelu" and readers == {maker}:
        return "gelu_tanh" if _text(maker, "approximate", "none") == "tanh" else "gelu"
    if maker.op_type != "Mul" or gate not in maker.inputs:
        return None
    logistic = _other(maker, gate).producer()
    if logistic is None or logistic.op_type != "Sigmoid" or logistic.domain or readers != {maker, logistic}:
        return None
    read_once = input_at(logistic, 0) is gate and _only_reader(logistic.outputs[0]) is maker
    return "silu" if read_once else None


def _halves(node: ir.Node) -> bool:
    """Whether a node splits the last axis into two halves, neither of which is an output of the graph."""
    if node.op_type != "Split" or node.domain or len(node.outputs) != 2:
        return False
    whole = input_at(node, 0).shape
    axis = node.attributes.get_int("axis", 0)
    if axis != -1 and (whole is None or axis != len(whole) - 1):
        return False
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        if node.inputs[1].const_value is None:
            return False
        first, second = array(node.inputs[1]).tolist()
        if first != second:
            return False
    return not any(half.is_graph_output() for half in node.outputs)


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The node that alone reads a value; None where several do, or the graph gives it."""
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value:
    """The other operand of a node of two."""
    first, second = input_at(node, 0), input_at(node, 1)
    return second if first is value else first


def _text(node: ir.Node, name: str, default: str) -> str:
    return node.attributes.get_string(name, default) or default
