"""What a pipeline cost, in terms of the task: how far two models are apart on real inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokopt.analysis.calibration import Sample, program_inputs
from tokopt.errors import InputError
from tokopt.ir.bundle import Bundle


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
    """Compare two bundles on samples (those of :mod:`tokopt.analysis.calibration`).

    A language model reads every text at once: what its cache would evict later does not show here. Raises
    InputError for samples that do not fit, and when there are none.
    """
    rows = [_compare(before, after, sample) for sample in samples]
    if not rows:
        raise InputError("there is no sample to compare on; pass a list of inputs")
    table = torch.cat(rows)
    if before.task == "encoder":
        error = float(table[:, 1].sum() / table[:, 2].sum().clamp_min(1e-30))
        return Features(float(table[:, 0].mean()), float(table[:, 0].min()), error)
    kl, top1, first, second = table.mean(0).tolist()
    return NextTokens(kl, top1, math.exp(first), math.exp(second))


def _compare(before: Bundle, after: Bundle, sample: Sample) -> Tensor:
    """A row of numbers per vector (encoder) or per predicted token."""
    wanted, got = (bundle.main(*program_inputs(bundle, sample))[0].double() for bundle in (before, after))
    if before.task == "encoder":
        if wanted.shape != got.shape:
            raise InputError(f"the outputs are of shapes {list(wanted.shape)} and {list(got.shape)}")
        wanted, got = wanted.flatten(0, -2), got.flatten(0, -2)
        energy = (wanted**2).sum(1)
        return torch.stack(
            [cosine_similarity(wanted, got, dim=1), ((wanted - got) ** 2).sum(1), energy], dim=1
        )
    tokens = program_inputs(before, sample)[0]
    old, new = wanted[:, :-1].log_softmax(-1), got[:, :-1].log_softmax(-1)
    following = tokens[:, 1:, None]
    columns = (
        (old.exp() * (old - new)).sum(-1),
        (old.argmax(-1) == new.argmax(-1)).double(),
        -old.gather(-1, following)[..., 0],
        -new.gather(-1, following)[..., 0],
    )
    return torch.stack([column.flatten() for column in columns], dim=1)
