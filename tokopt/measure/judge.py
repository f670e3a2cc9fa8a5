"""What an artifact costs in quality, run as it will be deployed and compared with another on real inputs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokopt.errors import InputError
from tokopt.measure.distance import predictions
from tokopt.runtime import LanguageModel, Model, load
from tokopt.runtime.loop import Request
from tokopt.runtime.numerics import cosines

Sample = Any
"""Inputs by name, or in their order, or one alone; of a language model the token ids of a text."""

FEATURES = ("cosine", "worst")
"""What :func:`judge` measures of an encoder."""

PREDICTIONS = ("KL", "top1", "perplexity")
"""What it measures of a language model."""

OWN = "metric"
"""The measure of a user's own function."""

CHUNK = 64
"""Tokens of a text that are predicted in one call."""


@dataclass(frozen=True)
class Floor:
    """The least quality that is accepted: ``cosine>=0.99``, or ``KL<=0.05``.

    Measures of an encoder are ``cosine`` (mean over the samples' vectors) and ``worst`` (the smallest); of a language
    model ``KL`` (nats), ``top1`` (share of equal first choices) and ``perplexity`` (ratio to the original's).
    ``metric`` is what a user's own function says.
    """

    measure: str
    sign: str
    limit: float

    @classmethod
    def parse(cls, text: str, measures: Sequence[str]) -> Floor:
        """Read a floor of one of the ``measures``; raises InputError.

        >>> Floor.parse("KL<=0.05", PREDICTIONS)
        Floor(measure='KL', sign='<=', limit=0.05)
        """
        found = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*([-+.\deE]+)\s*", text)
        try:
            assert found is not None
            floor = cls(found[1], found[2], float(found[3]))
        except (AssertionError, ValueError) as error:
            raise InputError(f"{text!r} is no floor; write one like cosine>=0.99 or KL<=0.05") from error
        if floor.measure not in measures:
            raise InputError(
                f"{floor.measure!r} is not measured of this model; choose among {', '.join(measures)}"
            )
        return floor

    def holds(self, quality: Mapping[str, float]) -> bool:
        """Whether the quality is good enough."""
        value = quality[self.measure]
        return value >= self.limit if self.sign == ">=" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.measure}{self.sign}{self.limit:g}"


def judge(original: Path, other: Path, samples: Iterable[Sample], threads: int | None) -> dict[str, float]:
    """The measures of :class:`Floor` for ``other`` against ``original``, both artifacts of target onnx.

    Of a text the first half is read as a prompt, so an eviction policy has dropped what it will when the second half
    is predicted, each token from those before it. Raises InputError when there is no sample, or a text is too short.
    """
    models = [load(path, threads=threads) for path in (original, other)]
    if isinstance(models[0], LanguageModel):
        rows = [_predictions(models, sample) for sample in samples]
    else:
        rows = [_vectors(models, sample) for sample in samples]
    if not rows:
        raise InputError("there is no sample to judge by; give at least two inputs")
    table = np.concatenate(rows)
    if not isinstance(models[0], LanguageModel):
        return {"cosine": float(table.mean()), "worst": float(table.min())}
    kl, top1, before, after = table.mean(0)
    return {"KL": float(kl), "top1": float(top1), "perplexity": float(np.exp(after - before))}


def _vectors(models: Sequence[Model], sample: Sample) -> np.ndarray:
    """The cosine of every vector of the first output."""
    named = {name: np.asarray(x) for name, x in sample.items()} if isinstance(sample, Mapping) else {}
    parts = sample if isinstance(sample, (list, tuple)) else [sample]
    given = [] if named else [np.asarray(x) for x in parts]
    wanted, got = (next(iter(model.run(*given, **named).values())) for model in models)
    return cosines(wanted, got).reshape(-1)


def _predictions(models: Sequence[LanguageModel], sample: Sample) -> np.ndarray:
    """KL, equal first choices, and both negative log-likelihoods of every token of the second half."""
    inputs: dict[str, np.ndarray] = {}
    if isinstance(sample, Mapping):
        inputs = {tensor.name: np.asarray(sample[tensor.name]) for tensor in models[0].interface.inputs}
        (sample,) = (value for name, value in sample.items() if name not in inputs)
    ids = np.asarray(sample).reshape(-1).tolist()
    if len(ids) < 4:
        raise InputError(f"a text of {len(ids)} tokens is too short to judge by; give longer ones")
    half = len(ids) // 2
    requests = [model.open(1, len(ids), inputs) for model in models]
    for request in requests:
        request.prefill([ids[:half]])
    rows = []
    for start in range(half, len(ids) - 1, CHUNK):
        part = np.array([ids[start : min(start + CHUNK, len(ids) - 1)]])
        places = np.arange(part.shape[1])
        old, new = (_logits(request, part, start + places[None]) for request in requests)
        rows.append(predictions(old, new, np.array(ids[start + 1 : start + 1 + len(places)])))
    return np.concatenate(rows)


def _logits(request: Request, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocabulary] of one row."""
    logits = request.step(tokens, positions, np.arange(tokens.shape[1])).logits
    assert logits is not None
    return logits[0]
