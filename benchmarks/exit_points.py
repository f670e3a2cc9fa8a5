"""What exits give on calibration and test inputs, and the exits, rule and tolerance that calibration inputs choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from tokopt.analysis.guarantee import Promise
from tokopt.passes.exit.calibrate import Answers, Choice, Parts, Records, choose, left_at, scores
from tokopt.passes.exit.heads import Affine, fit_logistic, fit_ridge, fit_temperature
from tokopt.passes.exit.rules import RULES, RuleName, load_rule
from tokopt.passes.exit.rules.base import Rule

CONFIDENCE, TOLERANCES = 0.95, (0.01, 0.02, 0.03, 0.05, 0.08, 0.12)
MOST_LOST = 0.01
"""Accuracy that an exit may lose."""

MOST_EXITS = 3
"""Exits of a placement that is tried, at most."""


@dataclass(frozen=True)
class Known:
    """What exits ``after`` so many of a model's ``blocks`` say of the calibration inputs and of the test inputs.

    ``answers`` are by the way in which heads are fitted, and by the part of the inputs.
    """

    after: tuple[int, ...]
    blocks: int
    parts: Parts
    answers: Mapping[str, Mapping[str, Answers]]
    labels: Mapping[str, Tensor]

    def at(self, places: Sequence[int]) -> Known:
        """What some of the exits say, by their places."""
        answers = {
            fit: {part: _some(one, places) for part, one in parts.items()}
            for fit, parts in self.answers.items()
        }
        return replace(self, after=tuple(self.after[i] for i in places), answers=answers)

    def placements(self) -> Iterator[Known]:
        """All exits, and all choices of at most :data:`MOST_EXITS` of them."""
        yield self
        for count in range(1, min(MOST_EXITS, len(self.after) - 1) + 1):
            for places in combinations(range(len(self.after)), count):
                yield self.at(places)

    def of_promise(self, fit: str) -> tuple[Answers, Tensor]:
        """What is said of the calibration inputs that fitted nothing, and their labels."""
        rows = self.parts.promised
        return _rows(self.answers[fit]["calibrate"], rows), self.labels["calibrate"][rows]

    def measured(self, answers: Answers, left: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy and mean depth of rows that leave at these exits."""
        depths = torch.tensor([*self.after, self.blocks], dtype=torch.float64)
        right = _right(answers, left, labels)
        return {"accuracy": float(right.mean()), "depth": float(depths[left].mean())}


def _some(answers: Answers, places: Sequence[int]) -> Answers:
    return Answers([answers.outputs[i] for i in places], [answers.features[i] for i in places], answers.final)


def _right(answers: Answers, left: Tensor, labels: Tensor) -> Tensor:
    """1 for every row [rows] that is told right where it leaves, else 0; float64."""
    said = torch.stack([one.argmax(1) for one in (*answers.outputs, answers.final)])
    return (said.gather(0, left[None])[0] == labels).double()


def _rows(answers: Answers, part: Tensor) -> Answers:
    return Answers(
        [x[part] for x in answers.outputs], [x[part] for x in answers.features], answers.final[part]
    )


def fit_of(rule: RuleName) -> str:
    """Classes are told best by logistic regression; other outputs have none."""
    return "logistic" if load_rule(rule).classes else "ridge"


def heads_of(known: Records, parts: Parts, own: Affine, exits: int) -> dict[str, list[list[Affine]]]:
    """The heads that the pass fits, by how."""
    made: dict[str, list[list[Affine]]] = {"ridge": [], "logistic": []}
    for e in range(exits):
        rows, held = known.rows(e, 0, parts.fitted), known.rows(e, 0, parts.held)
        head = fit_ridge(rows, held, own)
        soft = [replace(one, targets=one.targets.softmax(-1)) for one in (rows, held)]
        made["ridge"].append([head])
        made["logistic"].append([fit_logistic(soft[0], soft[1], head)])
    return made


@dataclass(frozen=True)
class Point:
    """What a tolerance chooses.

    ``shares`` are those of the calibration inputs that leave at each exit and at the end, ``expected`` their mean
    depth, and ``lost`` the accuracy that they lose, with the standard ``error`` of that; ``accuracy`` and ``depth`` are
    those of the test inputs.
    """

    tolerance: float
    shares: tuple[float, ...]
    expected: float
    lost: float
    error: float
    accuracy: float
    depth: float


@dataclass(frozen=True)
class Swept:
    """A rule at some exits: the thresholds to try, and its scores on the promise's inputs and on the test inputs."""

    known: Known
    fit: str
    rule: Rule
    candidates: Sequence[float]
    promised: Tensor
    losses: Tensor
    tested: Tensor

    @classmethod
    def of(cls, known: Known, name: RuleName) -> Swept:
        """The rule as the pass fits it."""
        rule, fit, parts = load_rule(name), fit_of(name), known.parts
        calibrated, test = (known.answers[fit][part] for part in ("calibrate", "test"))
        temperatures = [1.0] * len(known.after)
        if rule.classes:
            classes = calibrated.final.argmax(1)[parts.held]
            temperatures = [fit_temperature(one[parts.held], classes) for one in calibrated.outputs]
        losses = calibrated.losses(rule)
        held = _rows(calibrated, parts.held)
        fitted = rule.fit(held.seen(temperatures), list(losses[:, parts.held]))
        found = scores(rule, calibrated.seen(temperatures), fitted)
        tested = scores(rule, test.seen(temperatures), fitted)
        candidates = rule.thresholds(found[:, parts.held])
        return cls(known, fit, rule, candidates, found[:, parts.promised], losses[:, parts.promised], tested)

    def curve(self) -> list[dict[str, float]]:
        """Accuracy and depth of the test inputs at every threshold."""
        return [self._tested(threshold) for threshold in self.candidates]

    def points(self) -> list[Point]:
        """What the tolerances choose, where they can be promised."""
        found: list[Point] = []
        for tolerance in TOLERANCES:
            promise = Promise(tolerance, CONFIDENCE)
            chosen = choose(self.rule, self.candidates, self.promised, self.losses, promise)
            if chosen is not None:
                found.append(self._point(tolerance, chosen))
        return found

    def _point(self, tolerance: float, chosen: Choice) -> Point:
        answers, labels = self.known.of_promise(self.fit)
        exits = len(self.known.after)
        at_end = torch.full_like(chosen.left, exits)
        lost = _right(answers, at_end, labels) - _right(answers, chosen.left, labels)
        shares = torch.bincount(chosen.left, minlength=exits + 1).double() / len(labels)
        expected = self.known.measured(answers, chosen.left, labels)["depth"]
        error = float(lost.std()) / len(labels) ** 0.5
        tested = self._tested(chosen.threshold)
        return Point(tolerance, tuple(shares.tolist()), expected, float(lost.mean()), error, **tested)

    def _tested(self, threshold: float) -> dict[str, float]:
        left = left_at(self.rule, self.tested, threshold)
        return self.known.measured(self.known.answers[self.fit]["test"], left, self.known.labels["test"])


def curves(known: Known) -> dict[str, Any]:
    """What every rule and threshold gives with all exits, what the model gives, and what it gives cut short."""
    labels, test = known.labels["test"], known.answers["logistic"]["test"]
    whole, *cut = (
        known.measured(test, torch.full_like(labels, e), labels)
        for e in (len(known.after), *range(len(known.after)))
    )
    report: dict[str, Any] = {"full": whole, "static": cut, "rules": {}}
    for name in RULES:
        swept = Swept.of(known, name)
        points = [asdict(point) for point in swept.points()]
        report["rules"][name] = {"curve": swept.curve(), "points": points}
    return report


@dataclass(frozen=True)
class Chosen:
    """Exits, rule and tolerance, and the time that a row takes on average, as a share of the whole model's."""

    after: tuple[int, ...]
    rule: RuleName
    point: Point
    time: float


def operating_point(known: Known, cost: float) -> Chosen | None:
    """What is expected to be fastest and loses little, by calibration inputs alone; None where nothing does.

    Of many points the luckiest seems to lose least, so that a standard error is added to what each loses (the
    one-standard-error rule of Breiman et al., *Classification and Regression Trees*, 1984).
    ``cost`` is what an exit takes, as a share of what the model takes, whose blocks are taken for equal.
    """
    found: list[Chosen] = []
    for placed in known.placements():
        passed = [min(e + 1, len(placed.after)) for e in range(len(placed.after) + 1)]
        depths = [*placed.after, placed.blocks]
        for name in RULES:
            for point in Swept.of(placed, name).points():
                if point.lost + point.error <= MOST_LOST:
                    time = sum(
                        share * (depth / placed.blocks + count * cost)
                        for share, depth, count in zip(point.shares, depths, passed, strict=True)
                    )
                    found.append(Chosen(placed.after, name, point, time))
    return min(found, key=lambda one: one.time, default=None)
