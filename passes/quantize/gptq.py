"""GPTQ: round column by column, and let the columns to come make up for each error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokopt.analysis.calibration import Moments
from tokopt.errors import PassError
from tokopt.passes.quantize.base import Grid, QuantizedWeight, WeightQuantization, fit_grid

BLOCK = 128
"""Columns whose errors are handed on to the rest of the weight together."""


@dataclass(frozen=True)
class GPTQ(WeightQuantization):
    """Second-order rounding (arXiv 2210.17323).

    With ``H`` the mean of ``x^T x`` over the calibration inputs, plus ``damp`` times its mean diagonal, and ``U``
    the upper Cholesky factor of ``H^-1``: columns are rounded one after another, and the error of column i, over
    ``U_ii``, times ``U_i,j`` is taken from every column j to come. ``order`` rounds the columns of largest ``H_ii``
    first, with grids fitted beforehand; without it the grid of a group is fitted when its first column comes.
    Inputs that are always 0 get weight 0. All inputs are those of the float32 model; in the authors' code they come
    through the blocks quantized before.
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
        """Codes by columns; errors are handed on at once inside a block, and beyond it block by block."""
        assert moments is not None
        weight = weight.clone()
        weight[:, moments.gram.diagonal() == 0] = 0
        order = self._order(moments)
        columns = _Columns(self, bits, weight, order, _factor(moments.gram[order][:, order], self.damp))
        for start in range(0, len(order), BLOCK):
            columns.round_block(start, min(start + BLOCK, len(order)))
        return QuantizedWeight(columns.codes.byte(), columns.scale, columns.zero.byte(), self.group)

    def _order(self, moments: Moments) -> Tensor:
        diagonal = moments.gram.diagonal()
        return diagonal.argsort(descending=True, stable=True) if self.order else torch.arange(len(diagonal))

    def grid(self, weight: Tensor, bits: int) -> Grid:
        """The grid of round-to-nearest."""
        return fit_grid(weight, bits, self.group, symmetric=self.symmetric)


class _Columns:
    """A weight [out, in] while its columns are rounded: what is left of each, and what became of it."""

    def __init__(self, method: GPTQ, bits: int, weight: Tensor, order: Tensor, factor: Tensor) -> None:
        self.method, self.bits, self.order, self.factor = method, bits, order, factor
        self.grid = method.grid(weight, bits)
        self.scale, self.zero = self.grid.scale.clone(), self.grid.zero.clone()
        self.codes = torch.empty_like(weight)
        self.left = weight[:, order].clone()

    def round_block(self, start: int, stop: int) -> None:
        """Round columns ``start`` to ``stop`` of the order."""
        errors = [self._round(i, stop) for i in range(start, stop)]
        self.left[:, stop:] -= torch.stack(errors, dim=1) @ self.factor[start:stop, stop:]

    def _round(self, i: int, stop: int) -> Tensor:
        """Round one column and take its error, which is returned over ``U_ii``, from the block's other columns."""
        column, group = int(self.order[i]), self.method.group
        place = column // group
        if not self.method.order and column % group == 0:
            fitted = self.method.grid(self.left[:, i : i + group], self.bits)
            self.scale[:, place], self.zero[:, place] = fitted.scale[:, 0], fitted.zero[:, 0]
        scale, zero = self.scale[:, place], self.zero[:, place]
        code = self.grid.rounded(self.left[:, i, None, None], scale[:, None], zero[:, None])[:, 0, 0]
        self.codes[:, column] = code
        error = (self.left[:, i] - (code - zero) * scale) / self.factor[i, i]
        self.left[:, i:stop] -= error[:, None] * self.factor[i, i:stop]
        return error


def _factor(gram: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped ``gram``, in float64 and back."""
    gram = gram.double()
    dead = gram.diagonal() == 0
    gram = gram + torch.diag(dead.double())
    gram.diagonal().add_(damp * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True).float()
