"""GPTQ: round column by column, and let the columns to come make up for each error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokopt.analysis.calibration import Moments
from tokopt.errors import PassError
from tokopt.passes.quantization import QuantizedWeight, WeightQuantization, fit_grid

BLOCK = 128
"""Columns whose errors are handed on to the rest of the weight together."""


@dataclass(frozen=True)
class GPTQ(WeightQuantization):
    """Second-order rounding (arXiv 2210.17323).

    With ``H`` the mean of ``x^T x`` over the calibration inputs, plus ``damp`` times its mean diagonal, and ``U``
    the upper Cholesky factor of ``H^-1``: columns are rounded one after another, and the error of column i, over
    ``U_ii``, times ``U_i,j`` is taken from every column j to come. ``order`` rounds the columns of largest ``H_ii``
    first, with grids fitted beforehand; without it the grid of a group is fitted when its first column comes.
    Inputs that are always 0 get weight 0.
    """

    damp: float = 0.01
    order: bool = False

    name: ClassVar[str] = "gptq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damp <= 0:
            raise PassError(f"{self.name}: damp={self.damp} must be positive")

    def needs_moments(self) -> bool:
        """The inputs decide."""
        return True

    def quantize(self, weight: Tensor, bits: int, moments: Moments | None) -> QuantizedWeight:
        """Codes by columns."""
        assert moments is not None
        weight = weight.clone()
        diagonal = moments.gram.diagonal()
        weight[:, diagonal == 0] = 0
        columns = (
            diagonal.argsort(descending=True, stable=True) if self.order else torch.arange(weight.shape[1])
        )
        factor = _factor(moments.gram[columns][:, columns], self.damp)
        grid = fit_grid(weight, bits, self.group, symmetric=self.symmetric)
        scale, zero = grid.scale.clone(), grid.zero.clone()
        codes = torch.empty_like(weight)
        left = weight[:, columns].clone()
        for start in range(0, left.shape[1], BLOCK):
            stop = min(start + BLOCK, left.shape[1])
            errors = torch.empty(left.shape[0], stop - start)
            for i in range(start, stop):
                column = int(columns[i])
                place = column // self.group
                if not self.order and column % self.group == 0:
                    fitted = fit_grid(left[:, i : i + self.group], bits, self.group, symmetric=self.symmetric)
                    scale[:, place], zero[:, place] = fitted.scale[:, 0], fitted.zero[:, 0]
                s, z = scale[:, place], zero[:, place]
                code = grid.rounded(left[:, i, None, None], s[:, None], z[:, None])[:, 0, 0]
                codes[:, column] = code
                error = (left[:, i] - (code - z) * s) / factor[i, i]
                left[:, i:stop] -= error[:, None] * factor[i, i:stop]
                errors[:, i - start] = error
            left[:, stop:] -= errors @ factor[start:stop, stop:]
        return QuantizedWeight(codes.to(torch.uint8), scale, zero.to(torch.uint8), self.group)


def _factor(gram: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped ``gram``, in float64 and back."""
    gram = gram.double()
    dead = gram.diagonal() == 0
    gram = gram + torch.diag(dead.double())
    gram.diagonal().add_(damp * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True).float()
