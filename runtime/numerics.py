"""How far outputs are from what they should be: normalised mean squared error (NMSE), cosines, log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

LIMITS = {"float64": 1e-20, "float32": 1e-9, "float16": 1e-4, "bfloat16": 1e-3}
"""Largest NMSE per dtype. Summation order alone gives 1e-12 in float32 over 12 layers; another GELU, 1e-8."""

SELFTEST_LIMITS: Mapping[str, float | None] = {"exact": None, "lossless": None, "approximate": 2e-3}
"""Largest NMSE of a self-test that stores no limits of its own, by semantics class; None is the limit of the dtype.

A program that chooses tokens may, with another machine's rounding, choose another of two nearly equal ones: its
self-test is there to find damage and wrong kernels. Near ties alone gave up to 8e-4 (DINOv2-S of 1370 tokens).
"""


@dataclass(frozen=True)
class OutputCheck:
    """One compared output: its NMSE, the limit, and whether it holds."""

    name: str
    nmse: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the output is as close as its dtype allows; false for NaN."""
        return self.nmse <= self.limit


def nmse(expected: np.ndarray, actual: np.ndarray) -> float:
    """``sum((actual - expected)²) / sum(expected²)``, of the :func:`squares`."""
    return ratio(*squares(expected, actual))


def squares(expected: np.ndarray, actual: np.ndarray) -> tuple[float, float]:
    """``sum((actual - expected)²)`` and ``sum(expected²)`` in float64; those of several arrays may be added up.

    The first is infinite when shapes or dtypes differ, or when the non-finite elements are not the same ones; those
    that are equal (``-inf`` in masked logits) do not count.
    """
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return float("inf"), 1.0
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return float("inf"), 1.0
    return float(np.square(b[finite] - a[finite]).sum()), float(np.square(a[finite]).sum())


def ratio(error: float, energy: float) -> float:
    """The NMSE of a sum of squared errors: nothing where there is no error, and huge where nothing was expected."""
    return error / max(energy, np.finfo(np.float64).tiny) if error else 0.0


def cosines(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """The cosine similarity of every vector along the last axis [...] float64; 0 where one of the two is zero."""
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / np.maximum(lengths, 1e-30)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The log-probability of every entry of the last axis, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergences(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """The KL divergence, in nats, of every prediction of ``actual`` [..., vocabulary] from that of ``expected``.

    Both are logits; the result is [...] float64.
    """
    old, new = log_softmax(expected), log_softmax(actual)
    chance = np.exp(old)
    return (chance * np.subtract(old, new, where=chance > 0, out=np.zeros_like(old))).sum(-1)


def agreement(expected: np.ndarray, actual: np.ndarray) -> float:
    """The share of predictions [..., vocabulary] whose likeliest entry is the same."""
    return float((expected.argmax(-1) == actual.argmax(-1)).mean())


def check_output(
    name: str, expected: np.ndarray, actual: np.ndarray, limit: float | None = None
) -> OutputCheck:
    """Compare one output with the limit of its dtype (integers and booleans: equality)."""
    return OutputCheck(
        name, nmse(expected, actual), LIMITS.get(str(expected.dtype), 0.0) if limit is None else limit
    )
