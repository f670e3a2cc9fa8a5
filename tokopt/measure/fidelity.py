"""What a pipeline cost, in terms of the task: how far two models are apart on real inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tokopt.analysis.samples import Sample, tensors_of
from tokopt.arguments import check_iterable
from tokopt.errors import InputError
from tokopt.ir.bundle import Bundle, check_bundle
from tokopt.measure.distance import predictions
from tokopt.runtime.numerics import cosines, ratio, squares


@dataclass(frozen=True)
class Features:
    """An encoder's first output: the mean and the smallest cosine similarity over its vectors, and the NMSE."""

    cosine: float
    worst: float
    nmse: float

    def as_dict(self) -> dict[str, float]:
        """By the names that people use."""
        return {"cosine": self.cosine, "smallest cosine": self.worst, "NMSE": self.nmse}


@dataclass(frozen=True)
class NextTokens:
    """A language model's predictions: mean KL divergence in nats, share of equal first choices, both perplexities."""

    kl: float
    top1: float
    before: float
    after: float

    def as_dict(self) -> dict[str, float]:
        """By the names that people use."""
        names = ("KL divergence", "top-1 agreement", "perplexity before", "perplexity after")
        return dict(zip(names, (self.kl, self.top1, self.before, self.after), strict=True))


def fidelity(before: Bundle, after: Bundle, samples: Iterable[Sample]) -> Features | NextTokens:
    """Compare two bundles on samples (those of :mod:`tokopt.analysis.samples`).

    A language model reads every text at once: what its cache would evict later does not show here. Raises
    InputError for samples that do not fit, when there are none, and where the first bundle gives NaN.
    """
    check_bundle("before", before)
    check_bundle("after", after)
    check_iterable("samples", samples, "a list of inputs")
    compare = _predictions if before.schedule.generates else _vectors
    rows = [compare(before, after, given) for sample in samples for given in tensors_of(before, sample)]
    if not rows:
        raise InputError("there is no sample to compare on; pass a list of inputs")
    table = np.concatenate(rows)
    if not before.schedule.generates:
        error = ratio(float(table[:, 1].sum()), float(table[:, 2].sum()))
        return Features(float(table[:, 0].mean()), float(table[:, 0].min()), error)
    if not len(table):
        raise InputError("every sample is of one token, which nothing follows; give longer texts")
    kl, top1, first, second = map(float, table.mean(0))
    return NextTokens(kl, top1, math.exp(first), math.exp(second))


def _vectors(before: Bundle, after: Bundle, given: dict[str, Tensor]) -> np.ndarray:
    """The cosine, the squared error and the squared length of every vector [vectors, 3]."""
    wanted, got = _first_outputs(before, after, given)
    if wanted.shape != got.shape:
        raise InputError(f"the outputs are of shapes {list(wanted.shape)} and {list(got.shape)}")
    vectors = [x.reshape(-1, x.shape[-1]) for x in (wanted, got)]
    sums = [squares(*pair) for pair in zip(*vectors, strict=True)]
    return np.column_stack([cosines(*vectors), sums])


def _predictions(before: Bundle, after: Bundle, given: dict[str, Tensor]) -> np.ndarray:
    """What :func:`predictions` says of every token but the first of each text."""
    tokens = next(iter(given.values()))
    following = tokens[:, 1:].numpy().reshape(-1)
    wanted, got = (x[:, :-1].reshape(-1, x.shape[-1]) for x in _first_outputs(before, after, given))
    return predictions(wanted, got, following)


def _first_outputs(before: Bundle, after: Bundle, given: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The first outputs of both bundles, in float64."""
    wanted, got = (next(iter(bundle.outputs(given).values())) for bundle in (before, after))
    if bool(wanted.isnan().any()):
        raise InputError(
            "the model before the passes gives NaN for a sample, to which nothing compares; give other samples"
        )
    return wanted.double().numpy(force=True), got.double().numpy(force=True)
