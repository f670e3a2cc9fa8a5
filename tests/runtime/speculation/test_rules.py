"""Accept rules keep the target's distribution: every way of drafting and verifying is followed, with its weight."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.runtime.speculation.simulation import RULES
from tests.runtime.speculation.toys import (
    Scripted,
    branches,
    distribution_of,
    drawing,
    error_of,
    one_hot,
    rows,
    sequences,
    toy,
)
from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Decisions, Uniforms
from tokopt.runtime.speculation.distribution import residual, without
from tokopt.runtime.speculation.draft import Draft, Drawn
from tokopt.runtime.speculation.drawing import draw_tree
from tokopt.runtime.speculation.lossless import lossless
from tokopt.runtime.speculation.rules.base import Accepted, Prefix, Rule, Step, WalkingRule
from tokopt.runtime.speculation.rules.chain import Chain
from tokopt.runtime.speculation.rules.deterministic import Deterministic
from tokopt.runtime.speculation.rules.greedy import Greedy
from tokopt.runtime.speculation.rules.greedy_draft import GreedyDraft
from tokopt.runtime.speculation.rules.k_seq import KSeq, accepted_share, remainder, smallest_rho
from tokopt.runtime.speculation.rules.lantern import Lantern
from tokopt.runtime.speculation.rules.same_text import SameText
from tokopt.runtime.speculation.rules.typical import Typical
from tokopt.runtime.speculation.rules.with_replacement import WithReplacement
from tokopt.runtime.speculation.rules.without_replacement import WithoutReplacement
from tokopt.runtime.speculation.tree import Tree, merge_duplicates

NO_UNIFORMS = Uniforms(np.array([]))

CHAINS = [(2, 5), (4, 3)]
"""Nodes of a chain and the size of the vocabulary."""

TREES = [
    ([-1, 0, 0], 5),
    ([-1, 0, 0, 0], 4),
    ([-1, 0, 0, 1, 1], 3),
    ([-1, 0, 1, 0, 3], 3),
    ([-1, 0, 0, 1, 3], 3),
]
"""Parents and the size of the vocabulary."""

PLANS = [(Tree.chain(nodes), size) for nodes, size in CHAINS]
PLANS += [(Tree(np.array(parent)), size) for parent, size in TREES]

EXACT = [(rule, drawn) for rule in (*RULES, SameText()) for drawn in Drawn if drawn in rule.exact_for]
DRAWN_FROM_Q = [(rule, drawn) for rule, drawn in EXACT if rule.reads_q]
CASES = [
    (*pair, *plan)
    for pair in EXACT
    for plan in (PLANS[: len(CHAINS)] if isinstance(pair[0], Chain) else PLANS)
]
INEXACT = [(rule, drawn) for rule in RULES for drawn in Drawn if drawn not in rule.exact_for]


def name(value: object) -> str | None:
    return value.name if isinstance(value, Rule | Drawn) else None


def bias(rule: Rule, drawn: Drawn, plan: Tree, size: int, seed: int) -> float:
    """How far the output is from the target's sequence probabilities."""
    target, length = toy(size, seed, zeros=0.25), int(plan.depth.max()) + 1
    drafting = drawing(plan, toy(size, seed + 100, zeros=0.25), drawn)
    found = distribution_of(rule, drafting, target, length)
    return error_of(found, sequences(target, (0,), length))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rule", "drawn", "plan", "size"), CASES, ids=name)
def test_lossless_pairs_follow_the_target(rule: Rule, drawn: Drawn, plan: Tree, size: int, seed: int) -> None:
    assert lossless(rule, drawn).holds
    assert bias(rule, drawn, plan, size, seed) < 1e-12


@pytest.mark.parametrize(("rule", "drawn"), INEXACT, ids=name)
def test_other_pairs_are_refused_or_biased(rule: Rule, drawn: Drawn) -> None:
    verdict = lossless(rule, drawn)
    assert not verdict.holds and drawn.value in verdict.reason and rule.name in verdict.reason
    plans = [PLANS[1]] if isinstance(rule, Chain) else [PLANS[2]]
    try:
        assert max(bias(rule, drawn, *plan, seed) for plan in plans for seed in range(5)) > 1e-3
    except InputError as error:
        assert any(reason in str(error) for reason in ("no q", "same token", "its q is 0"))


@pytest.mark.parametrize("rule", [Typical(), Lantern(np.zeros((3, 1), int), 0.2)], ids=name)
@pytest.mark.parametrize("drawn", Drawn, ids=name)
def test_lossy_rules_say_so(rule: Rule, drawn: Drawn) -> None:
    verdict = lossless(rule, drawn)
    assert not verdict.holds and "lossy" in verdict.reason


# The check catches mistakes


@dataclass(frozen=True)
class NotNormalised(WithoutReplacement):
    """q loses the rejected token and is not normalised anew."""

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        p, q = prefix.p, prefix.q
        for token in prefix.candidates:
            assert q is not None
            if decisions.bernoulli(prefix.ratio(token, p, q)):
                return Step(token, token)
            p, q = residual(p, q), np.where(np.arange(len(q)) == token, 0, q)
        return Step(decisions.draw(p))


@dataclass(frozen=True)
class IgnoresQ(WithoutReplacement):
    """Accepts by p alone, and takes q off afterwards."""

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        p, q = prefix.p, prefix.q
        for token in prefix.candidates:
            assert q is not None
            if decisions.bernoulli(float(p[token])):
                return Step(token, token)
            p, q = residual(p, q), without(q, token)
        return Step(decisions.draw(p))


@dataclass(frozen=True)
class WrongOrder(WithoutReplacement):
    """q loses the rejected token before the residual is taken."""

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        p, q = prefix.p, prefix.q
        for token in prefix.candidates:
            assert q is not None
            if decisions.bernoulli(prefix.ratio(token, p, q)):
                return Step(token, token)
            q = without(q, token)
            p = residual(p, q)
        return Step(decisions.draw(p))


@dataclass(frozen=True)
class ForgetsResidual(WithReplacement):
    """Draws from p after rejections."""

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        for token in prefix.candidates:
            if decisions.bernoulli(prefix.ratio(token, prefix.p, prefix.drawn_from)):
                return Step(token, token)
        return Step(decisions.draw(prefix.p))


@dataclass(frozen=True)
class KeepsRejected(Deterministic):
    """A rejected token stays in p."""

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        for token in prefix.candidates:
            if decisions.bernoulli(float(prefix.p[token])):
                return Step(token, token)
        return Step(decisions.draw(prefix.p))


@dataclass(frozen=True)
class KSeqWithChainsResidual(KSeq):
    """The residual of a chain behind K-SEQ's decisions."""

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        if not prefix.candidates:
            return Step(decisions.draw(prefix.p))
        rho = smallest_rho(prefix.p, prefix.drawn_from, len(prefix.candidates))
        for token in prefix.candidates:
            if decisions.bernoulli(prefix.ratio(token, prefix.p / rho, prefix.drawn_from)):
                return Step(token, token)
        return Step(decisions.draw(residual(prefix.p, prefix.drawn_from)))


@dataclass(frozen=True)
class DividesByWholeQ(GreedyDraft):
    """The random child is held against q instead of the rest that it was drawn from."""

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        if not prefix.candidates:
            return Step(decisions.draw(prefix.p))
        *top, last = prefix.candidates
        p, q = prefix.p, prefix.drawn_from
        if decisions.bernoulli(prefix.ratio(last, p, q)):
            return Step(last, last)
        p = residual(p, q)
        for token in top:
            if decisions.bernoulli(float(p[token])):
                return Step(token, token)
            p = without(p, token)
        return Step(decisions.draw(p))


@dataclass(frozen=True)
class AcceptsMoreOften(Chain):
    """The bonus is right, the ratio is not: twice as many drafts are accepted."""

    def step(self, prefix: Prefix, decisions: Decisions) -> Step:
        if not prefix.candidates:
            return Step(decisions.draw(prefix.p))
        token = prefix.candidates[0]
        if decisions.bernoulli(min(1.0, 2 * prefix.ratio(token, prefix.p, prefix.drawn_from))):
            return Step(token, token)
        return Step(decisions.draw(residual(prefix.p, prefix.drawn_from)))


@dataclass(frozen=True)
class BonusFromDrafter(Chain):
    """What follows a chain that was accepted whole is drawn from the wrong row."""

    def verify(self, draft: Draft, p: object, decisions: Decisions) -> Accepted:
        wrong = np.array(p)
        wrong[-1] = wrong[0]
        return super().verify(draft, wrong, decisions)


MUTANTS = [
    (NotNormalised(), Drawn.WITHOUT_REPLACEMENT),
    (IgnoresQ(), Drawn.WITHOUT_REPLACEMENT),
    (WrongOrder(), Drawn.WITHOUT_REPLACEMENT),
    (ForgetsResidual(), Drawn.INDEPENDENT),
    (KeepsRejected(), Drawn.DETERMINISTIC),
    (KSeqWithChainsResidual(), Drawn.INDEPENDENT),
    (DividesByWholeQ(), Drawn.TOP_AND_ONE),
    (AcceptsMoreOften(), Drawn.INDEPENDENT),
    (BonusFromDrafter(), Drawn.INDEPENDENT),
]


@pytest.mark.parametrize(
    ("mutant", "drawn"), MUTANTS, ids=lambda v: type(v).__name__ if isinstance(v, Rule) else ""
)
def test_the_check_catches_wrong_rules(mutant: Rule, drawn: Drawn) -> None:
    plan, size = PLANS[0] if isinstance(mutant, Chain) else PLANS[2]
    assert max(bias(mutant, drawn, plan, size, seed) for seed in range(5)) > 1e-3


def test_the_check_catches_merged_copies() -> None:
    """Independent drafts count as often as they were drawn: one node for two of them changes the output."""
    plan, size = PLANS[2]

    def run(decisions: Decisions) -> Draft:
        found = draw_tree(plan, 0, drafter, Drawn.INDEPENDENT, decisions)
        tree, tokens, _ = merge_duplicates(found.tree, found.tokens)
        return Draft(tree, tokens, Drawn.INDEPENDENT, {0: drafter((0,))})

    worst = 0.0
    for seed in range(5):
        drafter, target = toy(size, seed + 100), toy(size, seed)
        found = distribution_of(KSeq(), run, target, 1)
        worst = max(worst, error_of(found, sequences(target, (0,), 1)))
    assert worst > 1e-3


# Limits


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_a_root_alone_is_one_plain_draw(rule: Rule) -> None:
    target = toy(4, 1)
    draft = Draft(Tree.chain(1), np.array([0]), Drawn.DETERMINISTIC)
    found = distribution_of(rule, lambda _: draft, target, 1)
    assert error_of(found, sequences(target, (0,), 1)) < 1e-15
    decisions = Uniforms(np.array([0.4, 0.4]))
    accepted = rule.verify(draft, rows(target, draft), decisions)
    assert accepted.path.tolist() == [0] and decisions.used == 1


def outcomes(rule: Rule, draft: Draft, p: np.ndarray) -> dict[tuple, float]:
    """The probability of every path and next token."""
    found: dict[tuple, float] = {}
    for accepted, weight in branches(lambda decisions: rule.verify(draft, p, decisions)):
        key = (tuple(accepted.path.tolist()), tuple(accepted.tokens.tolist()))
        found[key] = found.get(key, 0) + weight
    return found


@pytest.mark.parametrize("rule", [WithReplacement(), WithoutReplacement(), KSeq(), GreedyDraft()], ids=name)
@pytest.mark.parametrize("seed", range(4))
def test_one_child_makes_every_rule_a_chain(rule: Rule, seed: int) -> None:
    drafter, target = toy(4, seed + 100), toy(4, seed)
    for draft, _ in branches(drawing(Tree.chain(3), drafter, Drawn.INDEPENDENT)):
        p = rows(target, draft)
        assert error_of(outcomes(rule, draft, p), outcomes(Chain(), draft, p)) < 1e-14


@pytest.mark.parametrize(
    "rule", [Chain(), WithReplacement(), WithoutReplacement(), KSeq(), GreedyDraft()], ids=name
)
@pytest.mark.parametrize("seed", range(4))
def test_a_certain_drafter_is_deterministic(rule: Rule, seed: int) -> None:
    """With q one-hot, x is accepted with p(x), and leaves p when it is rejected."""
    target = toy(4, seed)
    draft = Draft(Tree.chain(3), np.array([0, 2, 1]), Drawn.INDEPENDENT, [one_hot(4, 2), one_hot(4, 1)])
    p = rows(target, draft)
    assert error_of(outcomes(rule, draft, p), outcomes(Deterministic(), draft, p)) < 1e-14


@pytest.mark.parametrize(("rule", "drawn"), DRAWN_FROM_Q, ids=name)
def test_a_drafter_equal_to_the_target_is_always_accepted(rule: Rule, drawn: Drawn) -> None:
    model = toy(5, 3)
    for draft, _ in branches(drawing(Tree.chain(3), model, drawn)):
        assert all(len(path) == 3 for path, _ in outcomes(rule, draft, rows(model, draft)))


@pytest.mark.parametrize(("rule", "drawn"), DRAWN_FROM_Q, ids=name)
def test_rounding_between_p_and_q_leaves_no_bias(rule: Rule, drawn: Drawn) -> None:
    """p and q that differ in their last bits: residuals of rounding errors, or of none at all."""
    plan = Tree.chain(2) if isinstance(rule, Chain) else Tree(np.array([-1, 0, 0]))
    for seed in range(8):
        target = toy(4, seed, zeros=0.3)
        noise = np.random.default_rng(seed).choice([-1e-16, 0, 2e-16], size=4)

        def drafter(text: tuple[int, ...], target=target, noise=noise) -> np.ndarray:
            return target(text) * (1 + noise)

        found = distribution_of(rule, drawing(plan, drafter, drawn), target, 1)
        assert error_of(found, sequences(target, (0,), 1)) < 1e-12


def test_probabilities_in_float32_are_normalised() -> None:
    target = toy(5, 7)
    draft = Draft(Tree.chain(2), np.array([0, 3]), Drawn.DETERMINISTIC)
    p = rows(target, draft).astype(np.float32) * np.float32(1 + 2e-5)
    found = distribution_of(Deterministic(), lambda _: draft, lambda text: target(text), 1)
    rough = outcomes(Deterministic(), draft, p)
    first: dict[tuple, float] = {}
    for (_, tokens), weight in rough.items():
        first[tokens[:1]] = first.get(tokens[:1], 0) + weight
    assert abs(sum(rough.values()) - 1) < 1e-12
    assert error_of(first, found) < 1e-6


# Greedy


@pytest.mark.parametrize("drawn", Drawn, ids=name)
@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_greedy_decoding_whatever_the_drafts(drawn: Drawn, seed: int) -> None:
    target = toy(3, seed)
    for plan, _ in PLANS:
        for draft, _ in branches(drawing(plan, toy(3, seed + 100), drawn)):
            accepted = Greedy().verify(draft, np.log(rows(target, draft)), NO_UNIFORMS)
            text = [0]
            for token in accepted.tokens.tolist():
                assert token == int(target(tuple(text)).argmax())
                text.append(token)
            longest = max(len(path) for path in paths_of(draft, text[1:]))
            assert len(accepted.path) == longest, "the longest match wins, in copies too"


def paths_of(draft: Draft, text: list[int]) -> list[tuple[int, ...]]:
    """The paths from the root whose tokens ``text`` begins with."""
    paths = [draft.tree.path(node) for node in range(draft.tree.nodes)]
    return [path for path in paths if draft.tokens[list(path[1:])].tolist() == text[: len(path) - 1]]


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    draft = Draft(Tree(np.array([-1, 0, 0])), np.array([0, 2, 1]), Drawn.DETERMINISTIC)
    p = np.array([[0.1, 0.45, 0.45], [1, 0, 0], [0.2, 0.2, 0.6]])
    accepted = Greedy().verify(draft, p, NO_UNIFORMS)
    assert accepted.path.tolist() == [0, 2] and accepted.tokens.tolist() == [1, 2]


# K-SEQ


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(10))
def test_rho_solves_its_equation_and_leaves_nothing_negative(k: int, seed: int) -> None:
    p, q = toy(5, seed, zeros=0.2)(()), toy(5, seed + 50, zeros=0.2)(())
    rho = smallest_rho(p, q, k)
    taken = np.minimum(q, p / rho).sum()
    assert 1 <= rho <= k and abs(1 - (1 - taken) ** k - rho * taken) < 1e-12
    share = accepted_share(p, q, k)
    for other in (1.0, rho, (1 + k) / 2, float(k), *(p[q > 0] / q[q > 0]).clip(1, k)):
        assert share(other) == pytest.approx(np.minimum(q, p / other).sum(), abs=1e-14)
    wanted = np.maximum(p - rho * q, 0)
    if wanted.sum() > 1e-9:  # at rho, the residual is that of a chain with rho q
        np.testing.assert_allclose(remainder(p, q, k, rho), wanted / wanted.sum(), atol=1e-9)


def test_drafts_that_the_target_never_says_are_rejected() -> None:
    p, q = np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 0.3, 0.7])
    draft = Draft(Tree(np.array([-1, 0, 0])), np.array([0, 2, 3]), Drawn.INDEPENDENT, [q])
    for rule in (KSeq(), WithReplacement()):
        found = outcomes(rule, draft, np.stack([p] * 3))
        assert found == pytest.approx({((0,), (0,)): 0.5, ((0,), (1,)): 0.5})


# Lossy rules


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("plan", [[-1, 0], [-1, 0, 0], [-1, 0, 0, 0]], ids=str)
def test_lantern_moves_at_most_delta(plan: list[int], seed: int) -> None:
    source = np.random.default_rng(seed)
    neighbours = np.stack([source.permutation(5)[:3] for _ in range(5)])
    target = toy(5, seed)
    drafting = drawing(Tree(np.array(plan)), toy(5, seed + 100), Drawn.DETERMINISTIC)
    wanted = sequences(target, (0,), 1)
    moved = []
    for delta in (0.0, 0.05, 0.3, 1.0):
        found = distribution_of(Lantern(neighbours, delta), drafting, target, 1)
        moved.append(sum(abs(found.get(text, 0) - wanted[text]) for text in wanted) / 2)
        assert moved[-1] <= delta + 1e-12
    assert moved[0] < 1e-12 and moved[-1] > 1e-3


def test_lantern_without_relaxation_is_exact() -> None:
    for plan, size in PLANS:
        rule = Lantern(np.tile(np.arange(size), (size, 1)), 0.0)
        assert lossless(rule, Drawn.DETERMINISTIC).holds
        assert bias(rule, Drawn.DETERMINISTIC, plan, size, 1) < 1e-12


def test_lantern_accepts_a_token_for_its_neighbours() -> None:
    p = np.array([0.5, 0.05, 0.15, 0.3])
    draft = Draft(Tree.chain(2), np.array([0, 1]), Drawn.DETERMINISTIC)
    rule = Lantern(np.array([[1, 2], [2, 0], [1, 3], [2, 1]]), 0.2)
    found = outcomes(rule, draft, np.stack([p, one_hot(4, 0)]))
    assert found == pytest.approx({((0, 1), (1, 0)): 0.2, ((0,), (0,)): 0.5, ((0,), (3,)): 0.3})


@pytest.mark.parametrize("seed", range(20))
def test_typical_takes_the_longest_path_above_the_threshold(seed: int) -> None:
    target, rule = toy(4, seed), Typical(0.3, 0.5)
    plan = Tree(np.array([-1, 0, 0, 1, 1, 2, 3]))
    draft = draw_tree(plan, 0, toy(4, seed + 100), Drawn.DETERMINISTIC, Scripted([]))
    p = rows(target, draft)

    def holds(path: tuple[int, ...]) -> bool:
        for parent, node in itertools.pairwise(path):
            row = p[parent]
            entropy = -sum(x * np.log(x) for x in row if x > 0)
            if not row[draft.tokens[node]] > min(0.3, 0.5 * np.exp(-entropy)):
                return False
        return True

    accepted = rule.verify(draft, p, NO_UNIFORMS)
    allowed = [path for path in map(draft.tree.path, range(draft.tree.nodes)) if holds(path)]
    assert tuple(accepted.path.tolist()) in allowed
    assert len(accepted.path) == max(map(len, allowed))
    last = int(accepted.path[-1])
    assert accepted.tokens.tolist() == [*draft.tokens[accepted.path[1:]], p[last].argmax()]


def test_typical_breaks_ties_and_keeps_its_threshold() -> None:
    """Of equally deep paths the likeliest wins, of equally likely ones the first; a token at the threshold is none."""
    draft = Draft(Tree(np.array([-1, 0, 0, 0])), np.array([0, 0, 1, 2]), Drawn.DETERMINISTIC)
    for first, wanted in (([0.25, 0.5, 0.25], 2), ([0.375, 0.375, 0.25], 1), ([0.125, 0.125, 0.75], 3)):
        accepted = Typical(0.125, 1.0).verify(draft, [np.array(first)] + [one_hot(3, 0)] * 3, NO_UNIFORMS)
        assert accepted.path.tolist() == [0, wanted]
    alone = Draft(Tree.chain(2), np.array([0, 0]), Drawn.DETERMINISTIC)
    for epsilon, length in ((0.125, 1), (0.12, 2)):
        accepted = Typical(epsilon, 1.0).verify(
            alone, [np.array([0.125, 0.125, 0.75]), one_hot(3, 0)], NO_UNIFORMS
        )
        assert len(accepted.path) == length


def test_typical_with_certain_targets_is_greedy() -> None:
    draft = Draft(Tree(np.array([-1, 0, 0, 2])), np.array([0, 1, 2, 1]), Drawn.DETERMINISTIC)
    p = np.stack([one_hot(3, 2), one_hot(3, 0), one_hot(3, 1), one_hot(3, 0)])
    accepted = Typical().verify(draft, p, NO_UNIFORMS)
    assert accepted.path.tolist() == [0, 2, 3] and accepted.tokens.tolist() == [2, 1, 0]


# What is refused

ROW = np.full(4, 0.25)
ONE = Draft(Tree.chain(2), np.array([0, 1]), Drawn.INDEPENDENT, [ROW])


@pytest.mark.parametrize("rule", [*RULES, SameText(), Typical(), Lantern(np.zeros((4, 1), int))], ids=name)
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (np.array([np.nan, 0.5, 0.25, 0.25]), "sums to nan"),
        (np.zeros(4), "sums to 0"),
        (np.array([2.0, -1, 0, 0]), "smallest entry is -1"),
        (np.array([1.0, 3, 2, 5]), "sums to 11"),
        (np.ones((1, 1)), "shape"),
        (np.array([]), "shape"),
    ],
    ids=["nan", "zeros", "negative", "logits", "axes", "empty"],
)
def test_a_target_that_is_no_distribution_is_refused(rule: Rule, row: np.ndarray, reason: str) -> None:
    with pytest.raises(InputError, match=f"p of node 0.*{reason}"):
        rule.verify(ONE, [row, ROW], Uniforms(np.full(4, 0.5)))


@pytest.mark.parametrize("rule", [r for r in RULES if not isinstance(r, Deterministic)], ids=name)
@pytest.mark.parametrize(
    ("q", "reason"),
    [
        ([np.array([np.nan, 0.5, 0.25, 0.25])], "q of node 0 sums to nan"),
        ([one_hot(4, 2)], "token 1 was drafted though its q is 0"),
        ([np.full(5, 0.2)], "q of node 0 has 5 tokens, p has 4"),
        (None, "the draft has no q"),
    ],
    ids=["nan", "impossible", "size", "none"],
)
def test_a_q_that_was_not_drawn_from_is_refused(rule: Rule, q: list | None, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        rule.verify(replace(ONE, q=q), [ROW, ROW], Uniforms(np.full(4, 0.5)))


@pytest.mark.parametrize(
    "rule", [*RULES, SameText(), Greedy(), Typical(), Lantern(np.zeros((4, 1), int))], ids=name
)
def test_tokens_outside_of_the_vocabulary_are_refused(rule: Rule) -> None:
    draft = replace(ONE, tokens=np.array([0, 4]))
    with pytest.raises(InputError, match="token"):
        rule.verify(draft, [ROW, ROW], Uniforms(np.full(4, 0.5)))


@pytest.mark.parametrize("rule", [WithoutReplacement(), GreedyDraft()], ids=name)
def test_copies_are_refused_where_they_do_not_count(rule: Rule) -> None:
    draft = Draft(Tree(np.array([-1, 0, 0])), np.array([0, 1, 1]), Drawn.INDEPENDENT, [ROW])
    with pytest.raises(InputError, match="merge duplicates"):
        rule.verify(draft, [ROW] * 3, Uniforms(np.full(4, 0.5)))


def test_a_chain_takes_one_child() -> None:
    draft = Draft(Tree(np.array([-1, 0, 0])), np.array([0, 1, 2]), Drawn.INDEPENDENT, [ROW])
    with pytest.raises(InputError, match="2 children"):
        Chain().verify(draft, [ROW] * 3, Uniforms(np.full(4, 0.5)))


def test_greedy_refuses_what_has_no_largest_entry() -> None:
    for row in ([np.nan, 1.0], [-np.inf, -np.inf], [np.inf, 0.0]):
        with pytest.raises(InputError, match="largest entry"):
            Greedy().verify(
                replace(ONE, tokens=np.array([0, 1])), [np.array(row)] * 2, Uniforms(np.array([]))
            )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Typical(epsilon=2),
        lambda: Typical(alpha=np.nan),
        lambda: Lantern(np.zeros((3, 1), int), delta=-0.1),
        lambda: Lantern(np.full((3, 1), 3)),
        lambda: Lantern(np.zeros((3, 1))),  # type: ignore[arg-type]
    ],
)
def test_options_out_of_range_are_refused(make) -> None:
    with pytest.raises(InputError):
        make()


def test_a_cut_keeps_the_nodes_of_the_tokens_that_stay() -> None:
    accepted = Accepted(np.array([0, 2, 5]), np.array([7, 8, 9]))
    assert accepted.cut(2).path.tolist() == [0, 2] and accepted.cut(2).tokens.tolist() == [7, 8]
    assert accepted.cut(9).tokens.tolist() == [7, 8, 9]
    with pytest.raises(InputError):
        accepted.cut(0)


def test_walking_rules_read_no_row_that_they_do_not_visit() -> None:
    """Rows are computed when they are asked for: those behind rejected nodes never are."""

    class Counted(dict):
        def __missing__(self, node: int) -> np.ndarray:
            self[node] = one_hot(4, 3)
            return self[node]

    p = Counted()
    draft = Draft(Tree(np.array([-1, 0, 0, 2, 1])), np.array([0, 1, 3, 2, 2]), Drawn.DETERMINISTIC)
    rules: list[WalkingRule] = [Deterministic(), Greedy()]
    for rule in rules:
        p.clear()
        rule.verify(draft, p, Uniforms(np.full(9, 0.5)))
        assert set(p) == {0, 2}
