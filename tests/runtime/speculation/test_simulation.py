"""Whole texts, written with every drafter and every rule that fits it, are those of the model alone."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from functools import cache

import numpy as np
import pytest

from tests.runtime.speculation.simulation import DRAFTERS, RULES, Host, random_uniforms, written
from tests.runtime.speculation.toys import Scripted, branches, error_of, sequences, toy
from tokopt.runtime.sampling import Streams, choose
from tokopt.runtime.speculation.acceptance import Acceptance
from tokopt.runtime.speculation.decisions import Decisions, Uniforms
from tokopt.runtime.speculation.lossless import lossless
from tokopt.runtime.speculation.planner.nodes import plan_nodes
from tokopt.runtime.speculation.rules.base import Rule
from tokopt.runtime.speculation.rules.chain import Chain
from tokopt.runtime.speculation.rules.deterministic import Deterministic
from tokopt.runtime.speculation.rules.greedy import Greedy
from tokopt.runtime.speculation.rules.same_text import SameText
from tokopt.runtime.speculation.tree import Tree
from tokopt.runtime.threefry import uniforms

PLAN = Tree(np.array([-1, 0, 0, 0, 1, 1, 2, 4, 4, 7]))
PROMPT = [0, 1, 2, 0, 1, 2, 0, 3, 1]

PAIRS = [
    (drafter, rule)
    for drafter, make in DRAFTERS.items()
    for rule in (*RULES, SameText())
    if lossless(rule, make(4).drawn).holds
]


def by_two(size: int, seed: int):
    """A model that looks at two tokens, so that its texts repeat themselves."""
    model = toy(size, seed, sharpness=2)
    return cache(lambda text: model(text[-2:]))


def greedy_text(model, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(tuple(text)).argmax()))
    return text


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_speculation_is_greedy_decoding(drafter: str, seed: int) -> None:
    model = by_two(12, seed)
    host = Host(DRAFTERS[drafter](12), Greedy(), model, PROMPT)
    assert written(host, PLAN, 200, random_uniforms(seed)) == greedy_text(model, PROMPT, 200)
    assert host.calls < 200, "something was accepted"


@pytest.mark.parametrize(("drafter", "rule"), PAIRS, ids=str)
def test_sampled_tokens_follow_the_model(drafter: str, rule: Rule) -> None:
    """After some calls, the next two tokens: every way of drafting and verifying, over as many calls as they take."""
    plan = Tree.chain(3) if isinstance(rule, Chain) else Tree(np.array([-1, 0, 0, 1]))
    if drafter == "suffix, independent":
        plan = Tree(plan.parent[:3])
    drafted = 0
    for seed in range(2):
        model = by_two(3, seed)
        host = Host(DRAFTERS[drafter](3), rule, model, [0, 1, 2, 0, 1, 2, 0])
        written(host, plan, 6, random_uniforms(seed))
        start = tuple(host.tokens)

        def run(decisions: Decisions, host=host, start=start) -> tuple[int, ...]:
            nonlocal drafted
            after = deepcopy(host)
            while len(after.tokens) < len(start) + 2:
                drafted += len(after.step(plan, decisions).path) - 1
            return tuple(after.tokens[len(start) : len(start) + 2])

        found: dict[tuple[int, ...], float] = defaultdict(float)
        for text, weight in branches(run):
            found[text] += weight
        assert error_of(found, sequences(model, start, 2)) < 1e-12
    assert drafted, "something was accepted"


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_rows_do_not_disturb_each_other(drafter: str) -> None:
    """Two texts side by side are those that each writes alone."""
    models = [by_two(12, seed) for seed in range(2)]
    alone = [Host(DRAFTERS[drafter](12), Greedy(), model, PROMPT) for model in models]
    wanted = [written(host, PLAN, 60, random_uniforms(0)) for host in alone]
    shared = DRAFTERS[drafter](12)
    hosts = [Host(shared, Greedy(), model, PROMPT) for model in models]
    decisions = random_uniforms(1)
    for host in hosts:
        host.start(decisions)
    while min(len(host.tokens) for host in hosts) < len(PROMPT) + 60:
        for host in hosts:
            host.step(PLAN, decisions)
    assert [host.tokens[: len(PROMPT) + 60] for host in hosts] == wanted


@pytest.mark.parametrize("drafter", ["prompt_lookup", "suffix", "lookahead", "logitspec"])
def test_drafts_of_a_row_are_those_it_would_have_alone(drafter: str) -> None:
    """Where nothing is shared, proposals too are independent of the other rows."""
    models, none = [by_two(12, seed) for seed in range(2)], Uniforms(np.array([]))
    shared = DRAFTERS[drafter](12)
    together = [Host(shared, Greedy(), model, PROMPT) for model in models]
    alone = [Host(DRAFTERS[drafter](12), Greedy(), model, PROMPT) for model in models]
    for host in (*together, *alone):
        host.start(none)
    for _ in range(20):
        for one, other in zip(together, alone, strict=True):
            draft, same = one.text.propose(PLAN, none), other.text.propose(PLAN, none)
            np.testing.assert_array_equal(draft.tokens, same.tokens)
            np.testing.assert_array_equal(draft.tree.parent, same.tree.parent)
            one.step(PLAN, none)
            other.step(PLAN, none)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_plan_of_one_node_drafts_nothing(drafter: str) -> None:
    model = by_two(12, 0)
    host = Host(DRAFTERS[drafter](12), Greedy(), model, PROMPT)
    assert written(host, Tree.chain(1), 30, random_uniforms(0)) == greedy_text(model, PROMPT, 30)
    assert host.calls == 30


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_plan_of_one_node_draws_the_text_of_plain_sampling(rule: Rule) -> None:
    """The same seed, the same tokens: decisions take the host's own random numbers, one per token."""
    model, plain, streams = by_two(12, 1), list(PROMPT), Streams(7, 1)
    for _ in range(60):
        logits = np.log(model(tuple(plain)))[None]
        plain.append(int(choose(logits, 1.0, streams)[0]))
    numbers = uniforms(np.array([7]), np.array([0]), np.array([0]), 60)[0]
    decisions = Uniforms(numbers)
    host = Host(DRAFTERS["suffix"](12), rule, model, PROMPT)
    assert written(host, Tree.chain(1), 60, decisions) == plain and decisions.used == 60


@pytest.mark.parametrize(("drafter", "rule"), PAIRS, ids=str)
def test_a_call_takes_at_most_one_uniform_per_node(drafter: str, rule: Rule) -> None:
    """One less for drawing than for verifying: a host can reserve them before it knows the outcome."""
    plan = Tree.chain(5) if isinstance(rule, Chain) else PLAN
    host, decisions = Host(DRAFTERS[drafter](12), rule, by_two(12, 4), PROMPT), random_uniforms(9)
    written(host, plan, 60, decisions)
    assert host.calls < decisions.used


def test_the_same_uniforms_write_the_same_text() -> None:
    model = by_two(12, 5)
    texts = [
        written(Host(DRAFTERS[drafter](12), rule, model, PROMPT), PLAN, 50, random_uniforms(3))
        for drafter, rule in (
            ("suffix", Deterministic()),
            ("suffix", Deterministic()),
            ("hybrid", Deterministic()),
        )
    ]
    assert texts[0] == texts[1] and len(texts[2]) == len(texts[0])


def test_plans_from_what_was_accepted_speed_up_the_text() -> None:
    """The whole loop: acceptance is counted, trees are planned from it, and the text stays that of greedy decoding."""
    model = by_two(12, 2)
    host = Host(DRAFTERS["token_recycling"](12), Greedy(), model, PROMPT)
    counts = Acceptance.assume(np.full((4, 4), 0.2))
    costs = {1: 1.0, 4: 1.2, 8: 1.5, 16: 2.5}
    none, spent = Uniforms(np.array([])), 0.0
    host.start(none)
    while len(host.tokens) < len(PROMPT) + 200:
        plan = plan_nodes(costs, counts.shares)
        draft = host.text.propose(plan.tree, none)
        counts = counts.observe(draft.tree, host.step(plan.tree, none).path)
        spent += float(np.interp(draft.tree.nodes, list(costs), list(costs.values())))
    assert host.tokens[: len(PROMPT) + 200] == greedy_text(model, PROMPT, 200)
    assert spent < 100


def test_the_enumeration_is_complete() -> None:
    """The weights of all ways of deciding sum to 1, whatever is decided how often."""

    def run(decisions: Decisions) -> int:
        count = 0
        while count < 4 and decisions.bernoulli(0.3):
            count += 1 + decisions.draw(np.array([0.5, 0.0, 0.5]))
        return count

    found = list(branches(run))
    assert sum(weight for _, weight in found) == pytest.approx(1, abs=1e-15)
    assert len({weight for _, weight in found}) > 1 and isinstance(Scripted([]).bernoulli(1.0), bool)
