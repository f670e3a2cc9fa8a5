"""Rules of leaving against naive versions, and heads against what they are to find."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tokopt.analysis.guarantee import Promise
from tokopt.passes.exit.calibrate import choose, divide, least, left_at, scores, total_loss
from tokopt.passes.exit.heads import Affine, Rows, fit_logistic, fit_ridge, fit_temperature
from tokopt.passes.exit.rules import RULES, RuleName, load_rule
from tokopt.passes.exit.rules.base import Seen

EXITS, ROWS, CLASSES, CHANNELS = 4, 30, 5, 7


def outputs(seed: int = 0) -> list[Tensor]:
    """What successive exits say: each is the one before and some noise, so that some classes stay."""
    generator = torch.Generator().manual_seed(seed)
    made = [2 * torch.randn(ROWS, CLASSES, generator=generator)]
    for _ in range(EXITS - 1):
        made.append(made[-1] + torch.randn(ROWS, CLASSES, generator=generator))
    return made


def features(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, CHANNELS, generator=generator) for _ in range(EXITS)]


def seen() -> list[Seen]:
    return [Seen(o, f) for o, f in zip(outputs(), features(), strict=True)]


FITTED = [torch.linspace(-1, 1, CHANNELS), torch.tensor([0.3])]


def probabilities(logits: Sequence[float]) -> list[float]:
    powers = [math.exp(x - max(logits)) for x in logits]
    return [power / sum(powers) for power in powers]


def naive(rule: str, row: int) -> list[float]:
    """The scores of one row, exit by exit, as the papers say them."""
    said = [one[row].tolist() for one in outputs()]
    if rule == "entropy":
        return [-sum(p * math.log(p) for p in probabilities(x)) for x in said]
    if rule == "margin":
        ordered = [sorted(probabilities(x), reverse=True) for x in said]
        return [p[0] - p[1] for p in ordered]
    if rule == "uncertainty":
        weight, bias = FITTED[0].tolist(), float(FITTED[1])
        inside = [sum(w * x for w, x in zip(weight, f[row].tolist(), strict=True)) for f in features()]
        return [1 / (1 + math.exp(-x - bias)) for x in inside]
    if rule == "patience":
        counts, before = [], None
        for x in said:
            answer = x.index(max(x))
            counts.append(counts[-1] + 1 if counts and answer == before else 0)
            before = answer
        return [float(count) for count in counts]
    found = [-1.0]
    for a, b in pairwise(said):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        found.append(dot / math.hypot(*a) / math.hypot(*b))
    return found


def naive_exit(rule: str, threshold: float, row: int) -> int:
    for place, score in enumerate(naive(rule, row)):
        enough = {
            "entropy": score < threshold,
            "margin": score > threshold,
            "uncertainty": score < threshold,
            "patience": score >= threshold,
            "convergence": score > threshold,
        }
        if enough[rule]:
            return place
    return EXITS


@pytest.mark.parametrize("name", RULES)
def test_scores_are_those_of_the_naive_rule(name: RuleName) -> None:
    found = scores(load_rule(name), seen(), FITTED)
    wanted = torch.tensor([naive(name, row) for row in range(ROWS)]).T
    torch.testing.assert_close(found.double(), wanted.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "thresholds"),
    {
        "entropy": (0.1, 0.6, 1.2),
        "margin": (0.1, 0.5, 0.9),
        "uncertainty": (0.2, 0.5, 0.9),
        "patience": (1, 2, 3),
        "convergence": (0.3, 0.7, 0.95),
    }.items(),
)
def test_rows_leave_where_the_naive_rule_lets_them(name: RuleName, thresholds: tuple[float, ...]) -> None:
    rule = load_rule(name)
    known = scores(rule, seen(), FITTED)
    for threshold in thresholds:
        left = left_at(rule, known, threshold).tolist()
        assert left == [naive_exit(name, threshold, row) for row in range(ROWS)]
        assert sum(left.count(place) for place in range(EXITS + 1)) == ROWS
    spread = {len(set(left_at(rule, known, threshold).tolist())) for threshold in thresholds}
    assert max(spread) > 2  # the thresholds part the rows


@pytest.mark.parametrize("name", RULES)
def test_at_its_limit_no_row_leaves(name: RuleName) -> None:
    """Also where an output is as sure as can be, or the same twice."""
    rule = load_rule(name)
    sure = torch.nn.functional.one_hot(torch.arange(ROWS) % CLASSES, CLASSES).float() * 1e4
    for said in (outputs(), [sure] * EXITS, [torch.zeros(ROWS, CLASSES)] * EXITS):
        given = [Seen(o, 1e6 * f) for o, f in zip(said, features(), strict=True)]
        assert left_at(rule, scores(rule, given, FITTED), rule.limit).tolist() == [EXITS] * ROWS


@pytest.mark.parametrize("name", RULES)
def test_candidates_let_more_and_more_rows_leave(name: RuleName) -> None:
    rule = load_rule(name)
    known = scores(rule, seen(), FITTED)
    left = [left_at(rule, known, threshold) for threshold in rule.thresholds(known)]
    for before, after in pairwise(left):
        assert bool((after <= before).all())
    assert len(left) > 2 and bool((left[-1] < left[0]).any())


def test_uncertainty_learns_where_an_exit_is_wrong() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 400, CHANNELS, generator=generator)
    wrong = (x[..., 0] + 0.5 * x[..., 3] > 0.7).double()
    rule = load_rule("uncertainty")
    told = [Seen(torch.zeros(400, CLASSES), one) for one in x]
    fitted = rule.fit(told, list(wrong))
    guess = scores(rule, told, fitted)
    assert float(guess[wrong > 0].mean()) > 0.5 > 0.2 > float(guess[wrong == 0].mean())
    assert bool((guess < 1).all()) and bool((guess > 0).all())


# --- heads --------------------------------------------------------------------------------------------------


def linear_rows(count: int, noise: float, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(CLASSES, CHANNELS, generator=torch.Generator().manual_seed(9))
    x = torch.randn(count, CHANNELS, generator=generator)
    return Rows(x, x @ truth.T + 3 + noise * torch.randn(count, CLASSES, generator=generator))


def nothing() -> Affine:
    return Affine(torch.zeros(CLASSES, CHANNELS), torch.zeros(CLASSES))


def test_ridge_finds_what_is_there() -> None:
    rows, held = linear_rows(200, 0, 3), linear_rows(50, 0, 4)
    made = fit_ridge(rows, held, nothing())
    torch.testing.assert_close(made(held.features), held.targets, atol=1e-3, rtol=1e-3)


def test_ridge_keeps_the_models_own_head_where_it_is_right() -> None:
    """With fewer rows than channels nothing else says what to do in the directions that were not seen."""
    generator = torch.Generator().manual_seed(5)
    own = Affine(
        torch.randn(CLASSES, CHANNELS, generator=generator), torch.randn(CLASSES, generator=generator)
    )
    x, held = torch.randn(3, CHANNELS, generator=generator), torch.randn(20, CHANNELS, generator=generator)
    made = fit_ridge(Rows(x, own(x)), Rows(held, own(held)), own)
    torch.testing.assert_close(made.weight, own.weight)
    torch.testing.assert_close(made.bias, own.bias)


def test_logistic_regression_prefers_the_classes() -> None:
    """Targets are no linear function: the squared error is misled by far points, the cross entropy is not."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(600, 2, generator=generator) * torch.tensor([1.0, 8.0])
    classes = (x[:, 0] > 0).long() + 2 * (x[:, 0] > 1).long() * (x[:, 0] > 0).long()
    classes = classes.clamp(max=2)
    targets = torch.nn.functional.one_hot(classes, 3).float()
    rows, held = Rows(x[:400], targets[:400]), Rows(x[400:], targets[400:])
    start = fit_ridge(rows, held, Affine(torch.zeros(3, 2), torch.zeros(3)))
    made = fit_logistic(rows, held, start)

    def right(head: Affine) -> float:
        return float((head(held.features).argmax(1) == classes[400:]).float().mean())

    assert right(made) > right(start) + 0.05 and right(made) > 0.95


@pytest.mark.parametrize("truth", [0.2, 1.0, 3.0])
def test_a_temperature_is_found(truth: float) -> None:
    """Classes that are drawn from ``softmax(logits / T)``."""
    generator = torch.Generator().manual_seed(7)
    logits = 2 * torch.randn(4000, CLASSES, generator=generator)
    classes = (logits / truth).softmax(1).multinomial(1, generator=generator)[:, 0]
    found = fit_temperature(logits, classes)
    assert found == pytest.approx(truth, rel=0.15)

    def loss(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / temperature, classes))

    assert loss(found) < min(loss(found * 1.1), loss(found / 1.1))


def test_a_head_that_is_always_right_is_not_sure_without_end() -> None:
    logits = torch.nn.functional.one_hot(torch.arange(20) % CLASSES, CLASSES).float()
    assert 0.05 < fit_temperature(logits, torch.arange(20) % CLASSES) < 1
    assert fit_temperature(logits, (torch.arange(20) + 1) % CLASSES) > 1


# --- the promise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 100, 597, 1001])
@pytest.mark.parametrize("fits", [False, True])
@pytest.mark.parametrize("promises", [False, True])
def test_every_row_has_one_part(count: int, fits: bool, promises: bool) -> None:
    parts = divide(count, fits=fits, promises=promises)
    together = torch.cat([parts.fitted, parts.held, parts.promised])
    assert together.sort().values.tolist() == list(range(count))
    assert bool(len(parts.promised)) == promises
    assert fits or not len(parts.fitted)


@pytest.mark.parametrize("fits", [False, True])
def test_the_fewest_inputs_are_enough_and_one_less_is_not(fits: bool) -> None:
    needed = Promise(0.01, 0.95).needed
    assert needed == 299
    count = least(needed, fits=fits)
    assert len(divide(count, fits=fits, promises=True).promised) >= 299
    assert len(divide(count - 1, fits=fits, promises=True).promised) < 299


@pytest.mark.parametrize("name", ["entropy", "margin", "patience", "convergence"])
def test_over_random_splits_the_promise_is_broken_at_most_as_often_as_promised(name: RuleName) -> None:
    """Rows drawn from a large set, whose disagreement at every threshold is known: that is what is promised."""
    generator = torch.Generator().manual_seed(8)
    rows, rule = 4000, load_rule(name)
    final = 2 * torch.randn(rows, CLASSES, generator=generator)
    said = [final + spread * torch.randn(rows, CLASSES, generator=generator) for spread in (1.5, 0.8, 0.3)]
    known = scores(rule, [Seen(one, one) for one in said], [])
    if rule.classes:
        losses = torch.stack([(one.argmax(1) != final.argmax(1)).double() for one in said])
    else:
        losses = torch.stack([1 - torch.cosine_similarity(one, final) for one in said]).clamp(0, 1).double()
    candidates = rule.thresholds(known[:, :500])
    true = {c: total_loss(losses, left_at(rule, known, c)) / rows for c in candidates}
    promise, draws, count = Promise(0.05, 0.9), 400, 250
    random = np.random.default_rng(9)
    broken = kept = 0
    for _ in range(draws):
        drawn = torch.from_numpy(random.integers(0, rows, count))
        choice = choose(rule, candidates, known[:, drawn], losses[:, drawn], promise)
        if choice is not None:
            kept += bool((choice.left < len(said)).any())
            broken += true[choice.threshold] > promise.tolerance
    assert kept > draws / 2  # the promise is not kept by letting no row leave
    assert broken <= draws * 0.1 + 3 * math.sqrt(draws * 0.1 * 0.9)
