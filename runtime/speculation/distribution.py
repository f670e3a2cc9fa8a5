"""Arithmetic of next-token distributions in float64."""

from __future__ import annotations

import numpy as np

from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Floats

TOLERANCE = 1e-4
"""How far from 1 a distribution may sum: a softmax in float32 is well within, logits are not."""


def read_distribution(name: str, row: object) -> Floats:
    """A distribution [vocabulary] in float64 that sums to 1. Raises InputError for anything else, NaN included."""
    given = np.asarray(row, np.float64)
    if given.ndim != 1 or not given.size:
        raise InputError(f"{name} has shape {given.shape}, it must be probabilities [vocabulary]")
    total = float(given.sum())
    if not abs(total - 1) <= TOLERANCE or given.min() < 0:
        raise InputError(
            f"{name} sums to {total:.6g} and its smallest entry is {given.min():.6g}; give probabilities that sum to 1"
        )
    return given / total


def without(distribution: Floats, token: int) -> Floats:
    """The distribution given that it is not ``token``; all zeros where nothing else is possible."""
    rest = distribution.copy()
    rest[token] = 0
    total = rest.sum()
    return rest / total if total > 0 else rest


def residual(p: Floats, q: Floats) -> Floats:
    """What is left of p where q took its part, ``[p - q]+``, normalised.

    Where p exceeds q nowhere, the two are equal up to rounding, and a rejection has a probability of that size: then p
    stays.
    """
    rest = np.maximum(p - q, 0)
    total = rest.sum()
    return rest / total if total > 0 else p
