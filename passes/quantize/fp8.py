"""8-bit floats: weights and activations of linears in E4M3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from tokopt.analysis.calibration import Moments
from tokopt.analysis.linears import Linear
from tokopt.kernels import ops
from tokopt.kernels.fake_float8.reference import LARGEST, to_float8
from tokopt.passes.quantize.base import put_weight
from tokopt.passes.quantize.products import TINY, ProductQuantization, Rounding


@dataclass(frozen=True)
class Float8Weight:
    """A weight [out, in] as ``codes * scale``; see :mod:`tokopt.kernels.dequantize_float8.reference`."""

    codes: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of an artifact: one of every number, and a float32 scale per output."""
        return self.codes.numel() + 4 * self.scale.numel()

    def dequantized(self) -> Tensor:
        """The weight [out, in] that it stands for."""
        return ops.dequantize_float8(self.codes, self.scale)

    def rows(self, part: slice) -> Float8Weight:
        """Some of its outputs."""
        return Float8Weight(self.codes[part], self.scale[part])


@dataclass(frozen=True)
class FP8(ProductQuantization):
    """Weights and activations in 8-bit floats of 3 bits of mantissa (E4M3), for GPUs that multiply such numbers.

    Weights have a scale per output, ``max|w| / 448``. ``activations=dynamic``: every token has a scale,
    ``max|x| / 448``, found as it comes; needs no data. ``activations=static``: one scale for all tokens, from the
    largest magnitude over the calibration inputs; what is larger later becomes that magnitude. Micikevicius et al.,
    *FP8 Formats for Deep Learning*, arXiv 2209.05433.

    Rules. As ``int8``.
    """

    name: ClassVar[str] = "fp8"

    def quantize(self, module: GraphModule, linear: Linear) -> Float8Weight:
        """Numbers of E4M3 in the place of the weight."""
        quantized = float8_weight(linear.matrix(module))
        put_weight(module, linear, ops.dequantize_float8, (quantized.codes, quantized.scale))
        return quantized

    def rounding(self, moments: Moments | None) -> Rounding:
        """With one scale for the range of all inputs, or a scale per token."""
        if moments is None:
            return Rounding(rounded_tokens)
        scale = max(float(moments.largest.max()) / LARGEST, TINY)
        return Rounding(ops.fake_float8.default, (scale,))


def float8_weight(weight: Tensor) -> Float8Weight:
    """The nearest numbers of E4M3 to a weight [out, in] over its scales."""
    scale = float8_scale(weight)
    return Float8Weight(to_float8(weight / scale).view(torch.uint8), scale)


def float8_scale(x: Tensor) -> Tensor:
    """``max|x| / 448`` over the last axis, which is kept."""
    return (x.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=TINY)


def rounded_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [..., channels] over their scale, rounded, and the scale [..., 1]."""
    scale = float8_scale(x)
    return ops.fake_float8(x / scale, 1.0), scale
