"""NUPES: codes of a power of the weights, the exponent searched per layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tokopt.analysis.calibration import Moments
from tokopt.errors import PassError
from tokopt.passes.quantize.base import (
    QuantizedWeight,
    WeightQuantization,
    fit_grid,
    output_error,
    signed_power,
)

EXPONENTS = tuple(i / 20 for i in range(20, 5, -1))
"""Tried per layer, 1 first: 1 to 0.3."""


@dataclass(frozen=True)
class NUPES(WeightQuantization):
    """Power-function quantization (PowerQuant, arXiv 2301.09858; NUPES, arXiv 2308.05600).

    A weight w is rounded as ``sign(w) |w|^a`` and read back as the power 1/a: for a < 1 the points of the grid lie
    denser around 0. Per layer, the ``exponent`` in 0.3 to 1 with the smallest output error on the calibration inputs
    is taken (smallest error of the weights, without any); 0 searches, a number is used as it is. With 1 this is
    ``rtn{symmetric=true}``.

    It saves bytes on disk. Engines have no product with such weights, so they expand them when they load.
    """

    symmetric: bool = True
    exponent: float = 0.0

    name: ClassVar[str] = "nupes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.symmetric:
            raise PassError(
                f"{self.name}: a power keeps the sign, so its grid is symmetric; leave symmetric=true"
            )
        if self.exponent and not 0.1 <= self.exponent <= 1:
            raise PassError(f"{self.name}: exponent={self.exponent} must be 0.1 to 1, or 0 to search")

    def uses_moments(self) -> bool:
        """The search is better on data."""
        return True

    def quantize(self, weight: Tensor, bits: int, moments: Moments | None) -> QuantizedWeight:
        """The nearest codes of the best power."""
        candidates = [self.exponent] if self.exponent else EXPONENTS
        tried = [self._rounded(weight, bits, exponent) for exponent in candidates]
        return min(tried, key=lambda one: output_error(weight, one.dequantized(), moments))

    def _rounded(self, weight: Tensor, bits: int, exponent: float) -> QuantizedWeight:
        power = signed_power(weight, exponent)
        grid = fit_grid(power, bits, self.group, symmetric=True)
        return replace(grid.packed(grid.codes(power)), exponent=exponent)
