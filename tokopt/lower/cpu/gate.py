"""One half of a product's outputs, after an activation, times the other half."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from tokopt.lower.onnx.nodes import array, input_at, only_reader, other_input, reader_alone


@dataclass(frozen=True)
class Gate:
    """``end`` multiplies the halves of a product; ``activation`` is what the first goes through before."""

    end: ir.Node
    activation: str


def gate_of(product: ir.Node) -> Gate | None:
    """The gate that alone reads the result of ``product``; None where something else does, or no activation is known.

    It is ``activation(first half) * second half``, with SiLU or GELU, exact or by tanh.
    """
    split = only_reader(product.outputs[0], "Split")
    if split is None or not _halves(split):
        return None
    gate, up = split.outputs
    end = only_reader(up, "Mul")
    if end is None:
        return None
    active = other_input(end, up)
    maker = active.producer()
    if maker is None or reader_alone(active) is not end:
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
    logistic = other_input(maker, gate).producer()
    if logistic is None or logistic.op_type != "Sigmoid" or logistic.domain or readers != {maker, logistic}:
        return None
    read_once = input_at(logistic, 0) is gate and reader_alone(logistic.outputs[0]) is maker
    return "silu" if read_once else None


def _halves(node: ir.Node) -> bool:
    """Whether a split makes two halves of the last axis, neither of which is an output of the graph."""
    if len(node.outputs) != 2:
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


def _text(node: ir.Node, name: str, default: str) -> str:
    return node.attributes.get_string(name, default) or default
