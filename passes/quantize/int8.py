"""8-bit products: weights and activations of linears in int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import linear as linear_product

from tokopt.analysis.calibration import Moments
from tokopt.analysis.linears import Linear
from tokopt.kernels import ops
from tokopt.passes.quantize.base import Quantization, QuantizedWeight, fit_grid, replace_weight
from tokopt.rewrite.edit import call, call_once

LEVELS = 127
"""The largest code of an activation."""

TINY = 1e-30
"""The smallest scale: a token of zeros stays one."""


@dataclass(frozen=True)
class Int8(Quantization):
    """Weights in 8 bits with a scale per output, activations in 8 bits: products of integers.

    ``activations=dynamic``: every token has a scale, ``max|x| / 127``, found as it comes; needs no data. The token is
    divided by it, rounded, multiplied, and multiplied by it again, so that the quantization itself is that of a
    constant scale 1, which every engine fuses. ``activations=static``: one scale and zero point for all tokens, from
    the range over the calibration inputs; one pass over x less, and outliers cost precision (``smoothquant`` before).

    Rules. As for weights alone, without groups. Meant for encoders and prompts: a single token gains nothing over
    weights alone.
    """

    activations: Literal["dynamic", "static"] = "dynamic"

    name: ClassVar[str] = "int8"

    def needs_moments(self) -> bool:
        """Static scales come from data."""
        return self.activations == "static"

    def apply(
        self, module: GraphModule, linear: Linear, bits: int, moments: Moments | None
    ) -> QuantizedWeight:
        """Quantize the weight, and the input in front of it."""
        weight = linear.matrix(module)
        grid = fit_grid(weight, bits, weight.shape[1], symmetric=True)
        quantized = grid.packed(grid.codes(weight))
        replace_weight(module, linear, quantized)
        node, graph = linear.node, module.graph
        if moments is not None:
            rounded = call_once(node, ops.fake_quantize.default, linear.input, *_range(moments))
            node.replace_input_with(linear.input, rounded)
            return quantized
        rounded, scale = call_once(node, rounded_tokens, linear.input)
        with graph.inserting_before(node):
            operands = (rounded, scale, linear.weight, linear.bias, linear.transposed)
            product = call(graph, scaled_product, *operands, like=node)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
        return quantized


def _range(moments: Moments) -> tuple[float, int]:
    """Scale and zero point of the range of all inputs."""
    scale = max((moments.high - moments.low) / 255, 1e-12)
    return scale, int(min(max(round(-128 - moments.low / scale), -128), 127))


def rounded_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [..., channels] over their scale, rounded, and the scale [..., 1]: ``max|x| / 127``."""
    scale = (x.abs().amax(dim=-1, keepdim=True) / LEVELS).clamp(min=TINY)
    return ops.fake_quantize(x / scale, 1.0, 0), scale


def scaled_product(x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """The linear on rounded tokens; the bias comes after they are multiplied by their scale again."""
    product = (torch.matmul(x, weight) if transposed else linear_product(x, weight)) * scale
    return product if bias is None else product + bias
