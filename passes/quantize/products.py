"""What quantizations of weights and activations share: where the activations are rounded, and scales per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import linear as linear_product

from tokopt.analysis.calibration import Moments
from tokopt.analysis.linears import Linear
from tokopt.passes.quantize.base import Quantization, StoredWeight
from tokopt.rewrite.edit import call, call_once

TINY = 1e-30
"""The smallest scale: zeros stay zeros."""


@dataclass(frozen=True)
class Rounding:
    """What rounds activations x [..., channels]: ``function(x, *options)``.

    It gives the rounded numbers, or with a scale per token both: numbers [..., channels] and scales [..., 1].
    """

    function: Callable[..., Any]
    options: tuple[float, ...] = ()


@dataclass(frozen=True)
class ProductQuantization(Quantization):
    """Weights and activations in fewer bits, these with a scale per token or with one from calibration inputs."""

    activations: Literal["dynamic", "static"] = "dynamic"

    def needs_moments(self) -> bool:
        """Static scales come from data."""
        return self.activations == "static"

    def quantize(self, module: GraphModule, linear: Linear) -> StoredWeight:
        """Quantize the weight of a linear, in place."""
        raise NotImplementedError

    def rounding(self, moments: Moments | None) -> Rounding:
        """How inputs of these moments are rounded; None where every token has its scale."""
        raise NotImplementedError

    def apply(self, module: GraphModule, linear: Linear, bits: int, moments: Moments | None) -> StoredWeight:
        """Quantize the weight, and the input in front of it."""
        quantized, rounding = self.quantize(module, linear), self.rounding(moments)
        node, given, graph = linear.node, linear.given, module.graph
        made = call_once(node, rounding.function, given, *rounding.options)
        if moments is not None:
            node.replace_input_with(given, made)
            return quantized
        rounded, scale = made
        with graph.inserting_before(node):
            operands = (rounded, scale, linear.weight, linear.bias, linear.transposed)
            product = call(graph, scaled_product, *operands, like=node)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
        return quantized


def scaled_product(x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """The linear on rounded tokens; the bias comes after they are multiplied by their scale again."""
    product = (torch.matmul(x, weight) if transposed else linear_product(x, weight)) * scale
    return product if bias is None else product + bias
