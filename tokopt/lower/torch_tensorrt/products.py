"""Quantized products in the form that TensorRT multiplies in 8 and 4 bits: steps above 0, and no zero points.

What is not so is moved behind the product, where it is a constant, or a product of the inputs' sums over the blocks of
the weight; :mod:`tokopt.lower.tensorrt.graph` does the same to ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tokopt.analysis.constants import constants, evaluate
from tokopt.analysis.linears import EXPANDING, Linear, as_linear
from tokopt.ir.graph import aten, is_call
from tokopt.ir.program import Program
from tokopt.kernels import ops
from tokopt.kernels.expert_linear.reference import take_expert
from tokopt.rewrite.edit import after, call, close_graph, open_graph, put_parameter

LARGEST = {4: 7, 8: 127}
"""Bits -> the largest code with a sign."""


@torch.library.custom_op("tokopt::expand_weight", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def expand_weight(codes: Tensor, step: Tensor, bits: int) -> Tensor:
    """``codes * step``: a weight [..., in, out] of codes [..., in, out] int8 with ``bits`` bits, or of 8-bit floats,
    and steps [..., blocks, out]; the axes in front, of size 1, are those that the other operand of the product has.

    Draws nothing: the tag keeps those who fold constants from expanding a weight that TensorRT multiplies as it is.
    """
    return codes.to(step.dtype) * step.repeat_interleave(codes.shape[-2] // step.shape[-2], -2)


@expand_weight.register_fake
def _(codes: Tensor, step: Tensor, bits: int) -> Tensor:
    return step.new_empty(codes.shape)


EXPAND_WEIGHT = torch.ops.tokopt.expand_weight.default


@dataclass(frozen=True)
class Symmetric:
    """A weight ``(codes * step) * sign``, and ``offset``: what the sums of the inputs over blocks have to be times.

    ``codes`` [in, out] int8 of ``bits`` bits or 8-bit floats, ``step`` [blocks, out] above 0; ``sign`` [out] and
    ``offset`` [blocks, out] are None where they do nothing.
    """

    codes: Tensor
    step: Tensor
    bits: int
    sign: Tensor | None
    offset: Tensor | None

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Symmetric:
        """From what ``tokopt::dequantize_weight`` takes: ``(codes - zero) * scale``, of unsigned codes [out, in]."""
        bits = 4 if int(codes.max()) < 16 and int(zero.max()) < 16 and scale.shape[1] > 1 else 8
        middle = LARGEST[bits] + 1
        signed, steps = codes.to(torch.int16).T - middle, scale.T
        negative, shift = steps < 0, zero.to(torch.int16).T - middle
        step = _positive(steps)
        if len(steps) == 1 and not shift.any():
            sign = torch.where(negative[0], -1.0, 1.0).to(scale.dtype) if negative.any() else None
            return cls(signed.to(torch.int8), step, bits, sign, None)
        # -1 - c has the range of c, which -c has not.
        flipped = torch.where(negative.repeat_interleave(group, 0), -1 - signed, signed)
        offset = torch.where(negative, shift + 1, -shift) * steps.abs()
        return cls(flipped.to(torch.int8), step, bits, None, offset if offset.any() else None)

    @classmethod
    def of_float8(cls, codes: Tensor, scale: Tensor) -> Symmetric:
        """From what ``tokopt::dequantize_float8`` takes: the numbers have the signs of their scales."""
        signed = codes.view(torch.float8_e4m3fn).float() * scale.sign()
        return cls(signed.to(torch.float8_e4m3fn).T, _positive(scale.T), 8, None, None)


def _positive(scale: Tensor) -> Tensor:
    """Steps without their signs; TensorRT refuses one of 0, whose codes are of no account."""
    return scale.abs().clamp_min(torch.finfo(scale.dtype).tiny)


def symmetric_products(program: Program) -> Program:
    """The same program, its quantized products by :func:`expand_weight` and ``tokopt::fake_quantize`` around zero."""
    module = open_graph(program)
    for node in list(module.graph.nodes):
        if is_call(node, ops.expert_linear):
            _multiply_all(module.graph, node)
    fixed = constants(module.graph)
    for node in list(module.graph.nodes):
        if is_call(node, ops.fake_quantize) and node.args[2]:
            _centre(module, node, fixed)
    for node in list(module.graph.nodes):
        linear = as_linear(node)
        if linear is not None and (quantized := _quantized(linear)) is not None:
            _replace(module, linear, quantized)
        elif is_call(node, ops.cache_write) and node.meta["val"].dtype == torch.int8:
            _write_as_floats(module, node)
    return close_graph(program, module)


def _multiply_all(graph: Graph, node: Node) -> None:
    """A product with chosen experts as one with all of them: TensorRT has no sizes that depend on what was chosen."""
    x, chosen, weight = node.args
    assert isinstance(weight, Node)
    experts, outputs, inputs = weight.meta["val"].shape
    whole = weight.args[0] if is_call(weight, aten.view) else None
    with graph.inserting_before(node):
        if not is_call(whole, *EXPANDING):
            whole = call(graph, torch.reshape, weight, [experts * outputs, inputs], like=node)
        every = call(graph, torch.nn.functional.linear, x, whole, like=node)
        made = call(graph, take_expert, every, chosen, experts, like=node)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _quantized(linear: Linear) -> Node | None:
    """The call that makes the weight [out, in] of a product from codes; None where there is none."""
    weight = linear.weight
    if linear.transposed:
        if not is_call(weight, aten.t, aten.numpy_T) or not isinstance(weight.args[0], Node):
            return None
        weight = weight.args[0]
    return weight if is_call(weight, *EXPANDING) else None


def _replace(module: GraphModule, linear: Linear, quantized: Node) -> None:
    parts = [evaluate(module, node, {}) for node in quantized.all_input_nodes]
    if is_call(quantized, ops.dequantize_float8):
        weight = Symmetric.of_float8(*parts)
    else:
        codes, scale, zero = parts
        weight = Symmetric.of(codes, scale, zero, int(quantized.args[3]))  # pyright: ignore[reportArgumentType]
    node, graph = linear.node, module.graph
    # TensorRT fuses what stands directly before the product: nothing may add axes there.
    axes = (None,) * (linear.input.meta["val"].ndim - 2)
    held = (weight.codes[axes], weight.step[axes], weight.sign, weight.offset)
    operands = [None if part is None else put_parameter(module, node, None, part) for part in held]
    with graph.inserting_before(node):
        function = partial(product, bits=weight.bits)
        made = call(graph, function, linear.input, *operands, linear.bias, like=node)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def product(
    x: Tensor,
    codes: Tensor,
    step: Tensor,
    sign: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
) -> Tensor:
    """``x @ weight + bias`` for a :class:`Symmetric` weight and x [..., in]; see :func:`expand_weight`."""
    result = torch.matmul(x, EXPAND_WEIGHT(codes, step, bits))
    if sign is not None:
        result = result * sign
    if offset is not None:
        sums = x.unflatten(-1, (offset.shape[0], x.shape[-1] // offset.shape[0])).sum(-1)
        result = result + torch.matmul(sums, offset)
    return result if bias is None else result + bias


def _centre(module: GraphModule, node: Node, fixed: set[Node]) -> None:
    """Take the zero point out of rounded activations; products with a weight get back what that adds to them."""
    graph, (x, scale, zero) = module.graph, node.args
    shift = float(zero) * float(scale)  # pyright: ignore[reportArgumentType]
    readers = list(node.users)
    with graph.inserting_before(node):
        centred = call(graph, _centred, x, scale, shift, like=node)
    for reader in readers:
        linear = as_linear(reader)
        if linear is not None and linear.input is node and linear.weight in fixed:
            lost = put_parameter(module, reader, None, -shift * linear.matrix(module).sum(1))
            reader.replace_input_with(node, centred)
            with after(reader):
                whole = call(graph, torch.add, reader, lost, like=reader)
            reader.replace_all_uses_with(whole, delete_user_cb=lambda user, made=whole: user is not made)
        else:
            with graph.inserting_before(reader):
                back = call(graph, torch.sub, centred, shift, like=reader)
            reader.replace_input_with(node, back)
    graph.erase_node(node)


def _centred(x: Tensor, scale: float, shift: float) -> Tensor:
    """``fake_quantize(x, scale, shift / scale) + shift``: rounded around zero."""
    return ops.fake_quantize(x + shift, scale, 0)


def _write_as_floats(module: GraphModule, node: Node) -> None:
    """Let a cache of bytes be floats of the same values while it is written: TensorRT scatters no bytes."""
    heads, channels = (int(node.meta["val"].shape[axis]) for axis in (1, 3))
    one = put_parameter(module, node, None, torch.ones(heads, 1, channels))
    with module.graph.inserting_before(node):
        made = call(module.graph, _written, *node.args, one, like=node)
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)


def _written(cache: Tensor, new: Tensor, length: Tensor, one: Tensor) -> Tensor:
    floats = ops.cache_write(ops.dequantize_int8(cache, one), ops.dequantize_int8(new, one), length)
    return ops.quantize_int8(floats, one)
