"""What exits would say of calibration inputs, and the threshold that keeps a promise on those that fitted nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokopt.analysis.guarantee import Promise
from tokopt.analysis.samples import Sample, read_samples
from tokopt.ir.bundle import Bundle
from tokopt.ir.calls import Calls
from tokopt.ir.format import Link
from tokopt.ir.program import Program
from tokopt.passes.exit.heads import Affine, Rows
from tokopt.passes.exit.rules.base import Rule, Seen
from tokopt.passes.exit.tail import Tail

PLACES = 16
"""Tokens of a row that a head for outputs per token is fitted to."""

FITTED, HELD = Fraction(35, 100), Fraction(15, 100)
"""Shares of the rows: those that heads are fitted to, and those that choose penalties, temperatures and candidates.

The others are for the promise alone. Candidates are chosen before the promise's rows are seen, so that their order does
not depend on them.
"""

SEED = 0
"""Of the order in which rows get their part, so that a sorted data set is no trap."""


@dataclass(frozen=True)
class Records:
    """What the exits read and the model gave, rows in front.

    ``features[e][h]`` [rows, (places), in] is what head h of exit e reads, ``targets[h]`` [rows, (places), out] what
    the model's own gives.
    """

    features: list[list[Tensor]]
    targets: list[Tensor]

    @property
    def count(self) -> int:
        """Rows."""
        return len(self.targets[0])

    def rows(self, exit_: int, head: int, part: Tensor) -> Rows:
        """Features and targets of some rows, those of all their tokens together."""
        features, targets = self.features[exit_][head][part], self.targets[head][part]
        return Rows(features.flatten(0, -2), targets.flatten(0, -2))


def collect(
    bundle: Bundle,
    probes: Mapping[str, Program],
    links: Sequence[Link],
    tail: Tail,
    samples: Iterable[Sample],
) -> Records:
    """Run stages without exits on all samples; every stage but the last gives the features of its heads.

    Raises InputError for samples that do not fit, and when there are none.
    """
    *early, last = probes
    features: list[list[list[Tensor]]] = [[[] for _ in tail.fitted] for _ in early]
    targets: list[list[Tensor]] = [[] for _ in tail.fitted]
    for given in read_samples(bundle, samples):
        calls = Calls(probes, links, (), given)
        for kept, name in zip(features, early, strict=True):
            for held, value in zip(kept, calls.outputs(name, "output").values(), strict=True):
                held.append(_some(value))
        made = list(calls.outputs(last, "output").values())
        for held, one in zip(targets, tail.fitted, strict=True):
            held.append(_some(made[one.place]))
    return Records(
        [[torch.cat(held) for held in kept] for kept in features], [torch.cat(held) for held in targets]
    )


def _some(value: Tensor) -> Tensor:
    """A value [rows, channels] as float32; of one with further axes, as many places of every row."""
    value = value.detach().float()
    if value.ndim == 2:
        return value
    value = value.flatten(1, -2)
    return value[:, torch.linspace(0, value.shape[1] - 1, PLACES).long()]


@dataclass(frozen=True)
class Parts:
    """Disjoint sets of rows: to fit to, to choose by, and for the promise."""

    fitted: Tensor
    held: Tensor
    promised: Tensor

    def fit_at_least(self, rows: int) -> bool:
        """Whether there are so many rows to fit to, and so many to choose by."""
        return min(len(self.fitted), len(self.held)) >= rows


def divide(count: int, *, fits: bool, promises: bool) -> Parts:
    """Rows by their parts; what nothing is fitted to, or promised by, leaves its rows to the others."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED))
    known = 1 if promises else FITTED + HELD  # without a promise all rows, in the same proportion
    fitted = math.floor(count * FITTED / known) if fits else 0
    held = math.floor(count * HELD) if promises else count - fitted
    return Parts(order[:fitted], order[fitted : fitted + held], order[fitted + held :])


def least(needed: int, *, fits: bool) -> int:
    """The fewest rows of which so many are for the promise.

    >>> least(299, fits=True), least(299, fits=False)
    (596, 351)
    """
    count = needed
    while len(divide(count, fits=fits, promises=True).promised) < needed:
        count += 1
    return count


def least_to_fit(rows: int, *, promises: bool) -> int:
    """The fewest rows of which so many are to fit to, and so many to choose by."""
    count = 2 * rows
    while not divide(count, fits=True, promises=promises).fit_at_least(rows):
        count += 1
    return count


@dataclass(frozen=True)
class Answers:
    """What exits say: ``outputs[e]`` [rows, n] of the output that decides, its ``features``, and the model's own."""

    outputs: list[Tensor]
    features: list[Tensor]
    final: Tensor

    @classmethod
    def of(cls, records: Records, heads: Sequence[Sequence[Affine]], decides: int) -> Answers:
        """The answers of fitted heads."""
        features = [one[decides] for one in records.features]
        outputs = [head[decides](x) for head, x in zip(heads, features, strict=True)]
        return cls(outputs, features, records.targets[decides])

    def losses(self, rule: Rule) -> Tensor:
        """How far each exit is from the model [exits, rows]: 1 for another class, or the cosine distance."""
        if rule.classes:
            full = self.final.argmax(-1)
            return torch.stack([(one.argmax(-1) != full).double() for one in self.outputs])
        near = [cosine_similarity(one.double(), self.final.double(), dim=-1) for one in self.outputs]
        return (1 - torch.stack(near)).clamp(0, 1)

    def seen(self, temperatures: Sequence[float]) -> list[Seen]:
        """What the rule is told at every exit."""
        pairs = zip(self.outputs, temperatures, self.features, strict=True)
        return [Seen(output / temperature, features) for output, temperature, features in pairs]


def scores(rule: Rule, seen: Sequence[Seen], fitted: Sequence[Tensor]) -> Tensor:
    """The scores [exits, rows] of a rule."""
    found: list[Tensor] = []
    carried: list[Tensor] = []
    for one in seen:
        score, carried = rule.score(one, carried, fitted)
        found.append(score)
    return torch.stack(found)


def left_at(rule: Rule, scores: Tensor, threshold: float) -> Tensor:
    """The exit at which every row leaves [rows]; the number of exits for one that goes to the end."""
    leaves = torch.cat([rule.leaves(scores, threshold), torch.ones_like(scores[:1], dtype=torch.bool)])
    return leaves.int().argmax(0)


def total_loss(losses: Tensor, left: Tensor) -> float:
    """The summed loss of rows that leave at these exits; at the end there is none."""
    whole = torch.cat([losses, torch.zeros_like(losses[:1])])
    return math.fsum(whole.gather(0, left[None])[0].tolist())


@dataclass(frozen=True)
class Choice:
    """A threshold, the exits at which the rows of the promise leave with it, and their summed loss."""

    threshold: float
    left: Tensor
    loss: float


def choose(
    rule: Rule, candidates: Sequence[float], scores: Tensor, losses: Tensor, promise: Promise
) -> Choice | None:
    """The most aggressive candidate, from conservative to aggressive, that keeps the promise; None without one."""
    left = [left_at(rule, scores, threshold) for threshold in candidates]
    totals = [total_loss(losses, one) for one in left]
    place = promise.last(totals, scores.shape[1])
    return None if place is None else Choice(candidates[place], left[place], totals[place])
