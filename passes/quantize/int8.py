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
from tokopt.passes.quantization import Quantization, QuantizedWeight, fit_grid, replace_weight
from tokopt.rewrite import call

LEVELS = 127
"""The largest code of an activation."""


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
        with graph.inserting_before(node):
            if moments is None:
                operands = (linear.input, linear.weight, linear.bias, linear.transposed)
                product = call(graph, dynamic_product, *operands, like=node)
                node.replace_all_uses_with(product)
                graph.erase_node(node)
            else:
                rounded = call(graph, ops.fake_quantize, linear.input, *_range(moments), like=node)
                node.replace_input_with(linear.input, rounded)
        return quantized


def _range(moments: Moments) -> tuple[float, int]:
    """Scale and zero point of the range of all inputs."""
    scale = max((moments.high - moments.low) / 255, 1e-12)
    return scale, int(min(max(round(-128 - moments.low / scale), -128), 127))


def dynamic_product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """The linear on tokens divided by their own scale; the bias comes after they are multiplied by it again."""
    scale = x.abs().amax(dim=-1, keepdim=True) / LEVELS
    scale = torch.where(scale > 0, scale, 1.0)
    rounded = ops.fake_quantize(x / scale, 1.0, 0)
    product = torch.matmul(rounded, weight) if transposed else linear_product(rounded, weight)
    return product * scale if bias is None else product * scale + bias
