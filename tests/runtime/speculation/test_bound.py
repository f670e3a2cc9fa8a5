"""The bound on acceptance: as brute force over sets and a linear program find it, and above what every rule accepts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import linprog

from tests.runtime.speculation.toys import branches, drawing, rows, toy
from tokopt.errors import InputError
from tokopt.runtime.speculation.bound import most_accepted, most_accepted_top_and_one
from tokopt.runtime.speculation.draft import Drawn
from tokopt.runtime.speculation.rules.base import Rule
from tokopt.runtime.speculation.rules.chain import Chain
from tokopt.runtime.speculation.rules.greedy_draft import GreedyDraft
from tokopt.runtime.speculation.rules.k_seq import KSeq
from tokopt.runtime.speculation.rules.with_replacement import WithReplacement
from tokopt.runtime.speculation.tree import Tree

SEEDS = range(8)


def pair(seed: int, size: int, zeros: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    return toy(size, seed, zeros=zeros)(()), toy(size, seed + 100, zeros=zeros)(())


def best_plan(p: np.ndarray, drafts: dict[tuple[int, ...], float]) -> float:
    """The most that any verifier accepts: a joint distribution of drafts and output with both marginals given."""
    size, rows_ = len(p), list(drafts)
    gain = np.array([[-float(token in row) for token in range(size)] for row in rows_])
    equal = np.zeros((len(rows_) + size, gain.size)).reshape(-1, *gain.shape)
    for i in range(len(rows_)):
        equal[i, i, :] = 1
    for token in range(size):
        equal[len(rows_) + token, :, token] = 1
    wanted = np.array([*drafts.values(), *p])
    found = linprog(gain.ravel(), A_eq=equal.reshape(len(wanted), -1), b_eq=wanted)
    assert found.success
    return -found.fun


def drafts_of(q: np.ndarray, count: int, drawn: Drawn) -> dict[tuple[int, ...], float]:
    found: dict[tuple[int, ...], float] = {}
    for draft, weight in branches(drawing(Tree(np.array([-1] + [0] * count)), lambda _: q, drawn)):
        tokens = tuple(draft.tokens[1:].tolist())
        found[tokens] = found.get(tokens, 0) + weight
    return found


@pytest.mark.parametrize("drafts", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_set_of_tokens_gives_a_lower_bound(drafts: int, seed: int) -> None:
    p, q = pair(seed, 6)
    sets = itertools.chain.from_iterable(itertools.combinations(range(6), n) for n in range(7))
    wanted = min(1 + p[list(some)].sum() - q[list(some)].sum() ** drafts for some in sets)
    assert most_accepted(p, q, drafts) == pytest.approx(wanted, abs=1e-14)


@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_linear_program_reaches_the_bounds(drafts: int, seed: int) -> None:
    p, q = pair(seed, 4)
    independent = best_plan(p, drafts_of(q, drafts, Drawn.INDEPENDENT))
    assert most_accepted(p, q, drafts) == pytest.approx(independent, abs=1e-9)
    top = best_plan(p, drafts_of(q, drafts, Drawn.TOP_AND_ONE))
    assert most_accepted_top_and_one(p, q, drafts) == pytest.approx(top, abs=1e-9)


def accepted(rule: Rule, p: np.ndarray, q: np.ndarray, drafts: int, drawn: Drawn) -> float:
    """The probability that a rule accepts one of so many drafts."""
    total = 0.0
    for draft, drawing_ in branches(drawing(Tree(np.array([-1] + [0] * drafts)), lambda _: q, drawn)):
        target = rows(lambda _: p, draft)
        for found, weight in branches(lambda decisions, d=draft, t=target: rule.verify(d, t, decisions)):
            total += drawing_ * weight * (len(found.path) > 1)
    return total


@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_rules_stay_below_the_bound_and_keep_their_promises(drafts: int, seed: int) -> None:
    p, q = pair(seed, 4)
    bound = most_accepted(p, q, drafts)
    rounds = accepted(WithReplacement(), p, q, drafts, Drawn.INDEPENDENT)
    k_seq = accepted(KSeq(), p, q, drafts, Drawn.INDEPENDENT)
    assert rounds <= bound + 1e-12 and (1 - 1 / math.e) * bound - 1e-12 <= k_seq <= bound + 1e-12
    greedy = accepted(GreedyDraft(), p, q, drafts, Drawn.TOP_AND_ONE)
    assert greedy == pytest.approx(most_accepted_top_and_one(p, q, drafts), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_draft_is_bounded_by_what_p_and_q_share(seed: int) -> None:
    p, q = pair(seed, 5)
    shared = pytest.approx(float(np.minimum(p, q).sum()), abs=1e-14)
    assert most_accepted(p, q, 1) == shared and most_accepted_top_and_one(p, q, 1) == shared
    assert accepted(Chain(), p, q, 1, Drawn.INDEPENDENT) == shared


def test_a_drafter_equal_to_the_target_can_always_be_accepted() -> None:
    for p in (np.array([1.0]), np.full(4, 0.25), np.array([0.7, 0.2, 0.1])):
        for drafts in (1, 2, 5):
            assert most_accepted(p, p, drafts) == pytest.approx(1, abs=1e-14)
            assert most_accepted_top_and_one(p, p, 1) == pytest.approx(1, abs=1e-14)


def test_bad_arguments() -> None:
    p = np.array([0.5, 0.5])
    for arguments in ((p, np.array([1.0]), 2), (p, np.array([np.nan, 1]), 2), (p, p, 0)):
        for bound in (most_accepted, most_accepted_top_and_one):
            with pytest.raises(InputError):
                bound(*arguments)
