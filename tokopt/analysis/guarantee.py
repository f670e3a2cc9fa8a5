"""Learn then test: a setting with a promise that holds for finite calibration data.

Angelopoulos et al., "Learn then test" (arXiv 2110.01052), as CALM (arXiv 2207.07061) uses it: settings are ordered from
conservative to aggressive before any data is seen, each is tested for a risk above the tolerance, and the first that
cannot be shown to keep it ends the sequence. The last setting before it has a risk above the tolerance with a
probability of at most ``1 - confidence``, over the draw of the calibration data. The promise is about inputs like
those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Promise:
    """The mean loss of an input is at most ``tolerance``, with ``confidence``; losses are between 0 and 1."""

    tolerance: float
    confidence: float

    def __post_init__(self) -> None:
        assert 0 < self.tolerance < 1 and 0 < self.confidence < 1, "both are between 0 and 1"

    @property
    def needed(self) -> int:
        """The fewest inputs of which a setting without any loss keeps the promise.

        >>> Promise(0.01, 0.95).needed, Promise(0.01, 0.9).needed
        (299, 230)
        """
        count = max(math.ceil(math.log(1 - self.confidence) / math.log1p(-self.tolerance)) - 1, 1)
        while not self.holds(0, count):  # the logarithms round, the test decides
            count += 1
        return count

    def holds(self, loss: float, count: int) -> bool:
        """Whether inputs with a total ``loss`` show it."""
        return p_value(loss, count, self.tolerance) <= 1 - self.confidence + _ROUNDING

    def allowed(self, count: int) -> int:
        """The most errors of so many inputs with which it holds; -1 where there are too few inputs even for none.

        >>> Promise(0.05, 0.95).allowed(200)
        3
        """
        errors = -1
        while errors < count and self.holds(errors + 1, count):
            errors += 1
        return errors

    def last(self, losses: Iterable[float], count: int) -> int | None:
        """The place of the most aggressive setting that keeps the promise; None where the first does not.

        ``losses`` are the total losses of the settings over the same ``count`` inputs, from conservative to aggressive.
        """
        found = None
        for place, loss in enumerate(losses):
            if not self.holds(loss, count):
                break
            found = place
        return found


_ROUNDING = 1e-12
"""``1 - 0.95`` is not 0.05 in floating point."""


def p_value(loss: float, count: int, risk: float) -> float:
    """A p-value of "the mean loss is above ``risk``", of ``count`` losses in [0, 1] with the sum ``loss``.

    The bound of Hoeffding and Bentkus (Bates et al., arXiv 2101.02703): ``exp(-n h(min(R, risk), risk))`` with the mean
    loss R and the divergence h of two coins, and ``e P[Binomial(n, risk) <= ceil(n R)]``, the smaller of both. It takes
    the sum and not the mean, since ``n * (k / n)`` need not be k in floating point, and would be rounded up.
    """
    mean = min(loss / count, risk)
    hoeffding = math.exp(-count * _divergence(mean, risk))
    bentkus = math.e * binomial_cdf(math.ceil(loss), count, risk)
    return min(1.0, hoeffding, bentkus)


def _divergence(a: float, b: float) -> float:
    """The Kullback-Leibler divergence of a coin of probability ``a`` from one of ``b``."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * (math.log1p(-a) - math.log1p(-b)) if a < 1 else 0.0)


def binomial_cdf(most: int, count: int, probability: float) -> float:
    """The probability of at most ``most`` successes in ``count`` trials.

    >>> round(binomial_cdf(1, 2, 0.5), 12)
    0.75
    """
    if most >= count:
        return 1.0
    if most < 0:
        return 0.0
    successes = np.arange(most + 1)
    factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, count + 1)))))
    ways = factorial[count] - factorial[successes] - factorial[count - successes]
    logs = ways + successes * math.log(probability) + (count - successes) * math.log1p(-probability)
    return float(min(np.exp(logs).sum(), 1.0))
