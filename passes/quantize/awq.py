"""AWQ: give the channels that carry most more of the grid, then shrink ranges that are too wide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokopt.analysis.calibration import Moments
from tokopt.analysis.linears import Linear
from tokopt.passes.quantize.base import QuantizedWeight, WeightQuantization, fit_grid
from tokopt.rewrite.scales import by_input, division, rescale

STEPS = 20
"""Exponents tried for the scale, and ranges tried for the clipping."""

SHRINK = 0.5
"""The smallest part of a range that clipping may leave."""


@dataclass(frozen=True)
class AWQ(WeightQuantization):
    """Activation-aware weight quantization (arXiv 2306.00978).

    The columns of linears that read one tensor x are multiplied by ``s = mean|x|^r``, over ``sqrt(max s min s)``, and
    x is divided by it, in the norm or the linear before. Of the exponents r = 0, 1/20, ..., 19/20 the one with the
    smallest output error is taken. Then the range of every group is shrunk to the best of 20 parts down to a half,
    by the error that the group's own inputs cause; ``clip=false`` leaves that out. The output error of W is
    ``tr(dW H dW^T)`` with H the mean of ``x^T x``, so the data is read once.

    Where nothing before can take the division, only ranges are shrunk. The authors' code leaves the projections of
    queries and keys unclipped, and clamps both ends of a group to one magnitude.
    """

    clip: bool = True

    name: ClassVar[str] = "awq"

    def needs_moments(self) -> bool:
        """The inputs decide."""
        return True

    def prepare(self, module: GraphModule, linears: list[Linear], known: dict[Node, Moments]) -> None:
        """Rescale every group whose error it lowers."""
        for group in by_input(linears):
            if division(module, group) is None:
                continue
            moments = known[group[0].input]
            weights = [linear.matrix(module) for linear in group]
            scale = min(self._scales(moments), key=lambda s: self._loss(weights, s, moments))
            if not torch.equal(scale, torch.ones_like(scale)):
                rescale(module, group, scale)
                moments.gram /= scale[:, None] * scale
                moments.mean /= scale
                moments.largest /= scale

    def quantize(self, weight: Tensor, bits: int, moments: Moments | None) -> QuantizedWeight:
        """The nearest codes on the shrunk grid."""
        assert moments is not None
        shrink = self._shrink(weight, bits, moments) if self.clip else 1.0
        grid = fit_grid(weight, bits, self.group, symmetric=self.symmetric, shrink=shrink)
        return grid.packed(grid.codes(weight))

    def _scales(self, moments: Moments) -> list[Tensor]:
        """The candidates, that of exponent 0 (ones) first."""
        mean = moments.mean.clamp(min=1e-4 * float(moments.mean.mean()) + 1e-12)
        powers = [mean ** (step / STEPS) for step in range(STEPS)]
        return [power / (power.max() * power.min()).sqrt() for power in powers]

    def _loss(self, weights: Sequence[Tensor], scale: Tensor, moments: Moments) -> float:
        """Squared output error of all the linears after rounding to nearest."""
        loss = 0.0
        for weight in weights:
            grid = fit_grid(weight * scale, self.bits, self.group, symmetric=self.symmetric)
            wrong = grid.packed(grid.codes(weight * scale)).dequantized() / scale - weight
            loss += float(((wrong @ moments.gram) * wrong).sum())
        return loss

    def _shrink(self, weight: Tensor, bits: int, moments: Moments) -> Tensor:
        """The part of every group's range that is kept [out, groups]."""
        grouped = weight.unflatten(1, (-1, self.group))
        blocks = torch.stack(
            [
                moments.gram[i : i + self.group, i : i + self.group]
                for i in range(0, weight.shape[1], self.group)
            ]
        )
        best, least = torch.ones(grouped.shape[:2]), torch.full(grouped.shape[:2], torch.inf)
        for step in range(STEPS):
            part = 1 - (1 - SHRINK) * step / STEPS
            grid = fit_grid(weight, bits, self.group, symmetric=self.symmetric, shrink=part)
            wrong = grid.packed(grid.codes(weight)).dequantized().unflatten(1, (-1, self.group)) - grouped
            loss = (torch.einsum("ogi,gij->ogj", wrong, blocks) * wrong).sum(-1)
            better = loss < least
            best, least = torch.where(better, part, best), torch.where(better, loss, least)
        return best
