"""What the ops of ``tokopt.cpu`` compute, in standard ops, for files that call them.

ONNX Runtime calls the registered kernel where there is one, and else the body, as any other runtime does. A body keeps
activations in float32, where the kernel rounds them to 8 bits: it says what the weights are, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tokopt.kernels.cpu import DOMAIN
from tokopt.lower.onnx.expand import Body

OP = "QuantizedLinear"

INPUTS = ("x", "codes", "scale", "zero", "minimum", "bias")


def overload(bits: int, given: Sequence[str], gate: str = "") -> str:
    """The name of the body for weights of so many bits with these optional inputs: ``4_minimum_bias_silu``."""
    return "_".join([str(bits), *given, *filter(None, [gate])])


def quantized_linear(bits: int, given: Sequence[str], opset: int, gate: str = "") -> ir.Function:
    """The body of ``QuantizedLinear`` with the optional inputs ``given``, of ``zero``, ``minimum`` and ``bias``.

    ``gate`` is empty, or the activation that the first half of the outputs goes through before it is multiplied by the
    second: ``silu``, ``gelu`` or ``gelu_tanh``.
    """
    body = Body(INPUTS)
    y = _product(body, body.inputs["x"], bits, given)
    if "bias" in given:
        y = body.op("Add", [y, body.inputs["bias"]])
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("bits", "group")]
    if gate:
        y = _gated(body, y, gate)
        attributes.append(ir.Attr("gate", ir.AttributeType.STRING, None))
    return ir.Function(
        DOMAIN, OP, overload(bits, given, gate), graph=body.graph([y], opset), attributes=attributes
    )


@dataclass(frozen=True)
class Follows:
    """What becomes of a product with chosen experts: a bias is added, it is gated, or summed by the experts' shares."""

    bias: bool = False
    gate: str = ""
    share: bool = False


EXPERT_INPUTS = ("x", "chosen", "codes", "scale", "zero", "minimum", "bias", "share")


def expert_linear(bits: int, follows: Follows, opset: int, *, zero: bool, flat: bool) -> ir.Function:
    """The body of ``ExpertLinear``, whose weight may have zero points.

    It multiplies with all experts. ``flat`` says that x is [tokens, in], and not [tokens, k or 1, in].
    """
    body = Body(EXPERT_INPUTS)
    given = ["zero"] if zero else []
    every = _product(body, _experts_rows(body, flat=flat), bits, given)
    experts = body.op("Constant", [], value_int=ir.RefAttr("value_int", "experts", ir.AttributeType.INT))
    y = _taken(body, every, body.inputs["chosen"], experts)
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("bits", "group", "experts")]
    name = [str(bits), *given, *(["flat"] if flat else [])]
    return _experts_body("ExpertLinear", name, body, y, follows, opset, attributes)


FLOAT_EXPERT_INPUTS = ("x", "chosen", "weight", "bias", "share")


def float_expert_linear(follows: Follows, opset: int, *, flat: bool) -> ir.Function:
    """The body of ``FloatExpertLinear``, which calls the function ``expert_linear`` of the domain ``tokopt``.

    ``flat`` says that x is [tokens, in], and not [tokens, k or 1, in].
    """
    body = Body(FLOAT_EXPERT_INPUTS)
    rows = _experts_rows(body, flat=flat)
    y = body.call("expert_linear", [rows, body.inputs["chosen"], body.inputs["weight"]])
    name = ["flat"] if flat else []
    return _experts_body("FloatExpertLinear", name, body, y, follows, opset)


def _experts_rows(body: Body, *, flat: bool) -> ir.Value:
    """``x`` [tokens, k or 1, in], which is ``flat`` if it is given as [tokens, in]."""
    x = body.inputs["x"]
    return body.op("Unsqueeze", [x, body.constant((1,), np.int64)]) if flat else x


def _experts_body(
    op: str,
    name: Sequence[str],
    body: Body,
    y: ir.Value,
    follows: Follows,
    opset: int,
    attributes: Sequence[ir.Attr] = (),
) -> ir.Function:
    """The body of ``op`` with what follows the product ``y`` [tokens, k, out]; ``name`` says what the product is."""
    own = list(attributes)
    if follows.bias:
        y = _with_bias(body, y)
    if follows.gate:
        y = _gated(body, y, follows.gate)
        own.append(ir.Attr("gate", ir.AttributeType.STRING, None))
    if follows.share:
        share = body.op("Unsqueeze", [body.inputs["share"], body.constant((1,), np.int64)])
        y = body.op("Squeeze", [body.op("MatMul", [share, y]), body.constant((1,), np.int64)])
    own_name = ["bias" if follows.bias else "", follows.gate, "share" if follows.share else ""]
    known = "_".join([*name, *filter(None, own_name)])
    return ir.Function(DOMAIN, op, known, graph=body.graph([y], opset), attributes=own)


def _with_bias(body: Body, y: ir.Value) -> ir.Value:
    """``y`` [tokens, k, out] and the biases of the chosen experts, of all [experts x out]; 0 where one is no expert."""
    chosen, zero = body.inputs["chosen"], body.constant(0, np.int64)
    shape = body.op("Concat", [body.constant((-1,), np.int64), body.op("Shape", [y], start=2, end=3)], axis=0)
    bias = body.op("Reshape", [body.inputs["bias"], shape])
    experts = body.op("Shape", [bias], start=0, end=1)
    known = body.op("And", [body.op("GreaterOrEqual", [chosen, zero]), body.op("Less", [chosen, experts])])
    added = body.op("Add", [y, body.op("Gather", [bias, body.op("Where", [known, chosen, zero])])])
    wide = body.op("Unsqueeze", [known, body.constant((2,), np.int64)])
    return body.op("Where", [wide, added, body.constant(0, np.float32)])


def _product(body: Body, x: ir.Value, bits: int, given: Sequence[str]) -> ir.Value:
    """``x`` times the weight that the inputs of a body describe."""
    codes, scale = body.inputs["codes"], body.inputs["scale"]
    zero, minimum = (body.inputs[name] if name in given else None for name in ("zero", "minimum"))
    weight = body.blocks(bits, body.after(x, codes), scale, zero, minimum)
    matrix = body.op("Reshape", [weight, body.constant((0, -1), np.int64)])
    return body.op("MatMul", [x, body.op("Transpose", [matrix], perm=[1, 0])])


def _taken(body: Body, every: ir.Value, chosen: ir.Value, experts: ir.Value) -> ir.Value:
    """What the chosen experts made [tokens, k, out] of what all made [tokens, k or 1, experts x out]."""
    count = body.op("Reshape", [experts, body.constant((1,), np.int64)])
    outputs = body.op("Div", [body.op("Shape", [every], start=2, end=3), count])
    shape = body.op("Concat", [body.op("Shape", [every], start=0, end=2), count, outputs], axis=0)
    split = body.op("Reshape", [every, shape])
    zero, one = (body.constant(number, np.int64) for number in (0, 1))
    place = body.op("Range", [zero, experts, one])
    last = body.constant((2,), np.int64)
    own = body.op("Equal", [body.op("Unsqueeze", [chosen, last]), place])
    row = body.op("Unsqueeze", [body.op("Cast", [own], to=ir.DataType.FLOAT), last])
    return body.op("Squeeze", [body.op("MatMul", [row, split]), last])


def _gated(body: Body, both: ir.Value, gate: str) -> ir.Value:
    """The activation of the first half of the last axis, times the second half."""
    half = body.op("Div", [body.op("Shape", [both], start=-1), body.constant((2,), np.int64)])
    ends = (body.constant((0,), np.int64), half, body.constant((np.iinfo(np.int64).max,), np.int64))
    last = body.constant((-1,), np.int64)
    gates, up = (body.op("Slice", [both, *ends[i : i + 2], last]) for i in range(2))
    if gate == "silu":
        active = body.op("Mul", [gates, body.op("Sigmoid", [gates])])
    else:
        active = body.op("Gelu", [gates], approximate="tanh" if gate == "gelu_tanh" else "none")
    return body.op("Mul", [active, up])
