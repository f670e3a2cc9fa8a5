"""Heads of exits, fitted on a frozen model: an affine map by ridge regression or logistic regression, a temperature.

Everything is closed form or a few steps in float64, on numbers that were computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e3)
"""Penalties that are tried, relative to the mean square of a feature."""

STEPS = 60
"""Steps of L-BFGS, and of the bisection of a temperature."""

HOTTEST = 1e3
"""Temperatures are between its inverse and this."""


@dataclass(frozen=True)
class Affine:
    """``x @ weight.T + bias`` with ``weight`` [out, in] and ``bias`` [out]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The output [..., out] for features [..., in]."""
        return x @ self.weight.T + self.bias

    def double(self) -> Affine:
        """In float64."""
        return Affine(self.weight.double(), self.bias.double())


@dataclass(frozen=True)
class Rows:
    """Features [rows, in] of an exit, and what its output [rows, out] is to be."""

    features: Tensor
    targets: Tensor

    def double(self) -> Rows:
        """In float64."""
        return Rows(self.features.double(), self.targets.double())


def fit_ridge(rows: Rows, held: Rows, prior: Affine) -> Affine:
    """The map of least squares with a penalty on its distance from ``prior``, the model's own last layer.

    The penalty is the one of :data:`PENALTIES` whose map errs least on the rows that were held back; a large one leaves
    the model's own weight and refits the bias alone.
    """
    rows, held, prior = rows.double(), held.double(), prior.double()
    mean = rows.features.mean(0)
    x, rest = rows.features - mean, rows.targets - prior(rows.features)
    offset = rest.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    projected = vectors.T @ (x.T @ (rest - offset))
    size = float(values.clamp_min(0).mean()) or 1.0

    def solved(penalty: float) -> Affine:
        change = (vectors @ (projected / (values.clamp_min(0) + penalty * size)[:, None])).T
        return Affine(prior.weight + change, prior.bias + offset - change @ mean)

    return _best(solved, lambda made: float((made(held.features) - held.targets).square().sum()))


def fit_logistic(rows: Rows, held: Rows, start: Affine) -> Affine:
    """The map whose classes have the least cross entropy from ``targets``, which are probabilities of classes.

    It begins at ``start`` and is penalized for its distance from there, as :func:`fit_ridge` is.
    """
    rows, held, start = rows.double(), held.double(), start.double()
    size = float(rows.features.square().mean()) or 1.0

    def solved(penalty: float) -> Affine:
        weight = start.weight.clone().requires_grad_()
        bias = start.bias.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = rows.features @ weight.T + bias
            far = (weight - start.weight).square().sum()
            loss = cross_entropy(logits, rows.targets) + penalty * size * far
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        return Affine(weight.detach(), bias.detach())

    return _best(solved, lambda made: float(cross_entropy(made(held.features), held.targets)))


def _best(solved: Callable[[float], Affine], error: Callable[[Affine], float]) -> Affine:
    """The map with the least error among those of all penalties."""
    made = min(map(solved, PENALTIES), key=error)
    return Affine(made.weight.float(), made.bias.float())


def fit_temperature(logits: Tensor, classes: Tensor) -> float:
    """The T > 0 with which ``softmax(logits / T)`` gives ``classes`` [rows] the largest likelihood.

    The likelihood is concave in 1 / T, so its slope has one zero, which is bisected. One row more counts whose class
    may be any: without it no row that is wrong would mean no doubt at all, at any logits.
    """
    logits = logits.double()
    unknown = 1 / (len(logits) + 1)
    given = (1 - unknown) * logits.gather(1, classes[:, None]).mean() + unknown * logits.mean()
    low, high = 1 / HOTTEST, HOTTEST  # of 1 / T
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        slope = given - ((logits * middle).softmax(1) * logits).sum(1).mean()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return 1 / (low * high) ** 0.5
