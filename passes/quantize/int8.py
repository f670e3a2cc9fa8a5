"""8-bit products: weights and activations of linears in int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule

from tokopt.analysis.calibration import Moments
from tokopt.analysis.linears import Linear
from tokopt.kernels import ops
from tokopt.passes.quantize.base import MORE_BITS, QuantizedWeight, replace_weight, round_to_nearest
from tokopt.passes.quantize.products import TINY, ProductQuantization, Rounding

LEVELS = 127
"""The largest code of an activation."""


@dataclass(frozen=True)
class Int8(ProductQuantization):
    """Weights in 8 bits with a scale per output, activations in 8 bits: products of integers.

    ``activations=dynamic``: every token has a scale, ``max|x| / 127``, found as it comes; needs no data. The token is
    divided by it, rounded, multiplied, and multiplied by it again, so that the quantization itself is that of a
    constant scale 1, which every engine fuses. ``activations=static``: one scale and zero point for all tokens, from
    the range over the calibration inputs; one pass over x less, and outliers cost precision (``smoothquant`` before).

    Rules. As for weights alone, without groups. Meant for encoders and prompts: a single token gains nothing over
    weights alone.
    """

    name: ClassVar[str] = "int8"

    def quantize(self, module: GraphModule, linear: Linear) -> QuantizedWeight:
        """Codes in the place of the weight."""
        weight = linear.matrix(module)
        quantized = round_to_nearest(weight, MORE_BITS, weight.shape[1], symmetric=True)
        replace_weight(module, linear, quantized)
        return quantized

    def rounding(self, moments: Moments | None) -> Rounding:
        """With one scale and zero point for the range of all inputs, or a scale per token."""
        if moments is None:
            return Rounding(rounded_tokens)
        scale = max((moments.high - moments.low) / 255, 1e-12)
        zero = int(min(max(round(-128 - moments.low / scale), -128), 127))
        return Rounding(ops.fake_quantize.default, (scale, zero))


def rounded_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [..., channels] over their scale, rounded, and the scale [..., 1]: ``max|x| / 127``."""
    scale = (x.abs().amax(dim=-1, keepdim=True) / LEVELS).clamp(min=TINY)
    return ops.fake_quantize(x / scale, 1.0, 0), scale
