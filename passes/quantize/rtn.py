"""Round to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokopt.analysis.calibration import Moments
from tokopt.passes.quantize.base import QuantizedWeight, WeightQuantization, round_to_nearest


@dataclass(frozen=True)
class RTN(WeightQuantization):
    """Every weight to the nearest point of its group's grid: the baseline of weight quantization.

    Needs no data. Asymmetric: ``scale = (max - min) / (2^bits - 1)`` and ``zero = round(-min / scale)`` per group.
    """

    name: ClassVar[str] = "rtn"

    def quantize(self, weight: Tensor, bits: int, moments: Moments | None) -> QuantizedWeight:
        """The nearest codes."""
        return round_to_nearest(weight, bits, self.group, symmetric=self.symmetric)
