"""Trees as tensors and drafters, beside versions of them that walk from node to node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.speculation.toys import Scripted, next_script, rows, sequences, toy
from tokopt.errors import PassError
from tokopt.ir.format import Generation
from tokopt.ir.program import TensorSpec
from tokopt.passes import Speculate
from tokopt.passes.speculate.drafters import DRAFTERS, Verified, learns_by_reading, load_drafter
from tokopt.passes.speculate.drafters.token_recycling import LEVELS
from tokopt.passes.speculate.lossy import Lantern, LossyRule, Typical
from tokopt.passes.speculate.tree import accepted, accepted_in_chain, best_first, chain, is_chain, tree
from tokopt.runtime.selftest import compared
from tokopt.runtime.speculation.draft import Draft, Drawn
from tokopt.runtime.speculation.drafters.base import Verified as HostVerified
from tokopt.runtime.speculation.drafters.token_recycling import TokenRecycling
from tokopt.runtime.speculation.host import shallow
from tokopt.runtime.speculation.lossless import lossless
from tokopt.runtime.speculation.rules.base import Accepted, Rule
from tokopt.runtime.speculation.rules.lantern import Lantern as HostLantern
from tokopt.runtime.speculation.rules.typical import Typical as HostTypical
from tokopt.runtime.speculation.tree import Tree as Plan

GENERATION = Generation(context=40, vocabulary=12)


@st.composite
def parents(draw: st.DrawFn) -> list[int]:
    size = draw(st.integers(1, 12))
    return [-1, *(draw(st.integers(0, node - 1)) for node in range(1, size))]


def lineage(up: list[int], node: int) -> list[int]:
    """The node and its ancestors, the root last."""
    return [node, *lineage(up, up[node])] if node else [0]


@settings(max_examples=60)
@given(parents())
def test_a_tree_says_who_descends_from_whom(up: list[int]) -> None:
    shape = tree(torch.tensor(up))
    for node in range(len(up)):
        line = lineage(up, node)
        assert set(torch.nonzero(shape.sees[node]).flatten().tolist()) == set(line)
        assert int(shape.depth[node]) == len(line) - 1
        assert int(shape.rank[node]) == up[:node].count(up[node])


@settings(max_examples=100)
@given(parents(), st.data())
def test_the_longest_right_path_is_committed(up: list[int], data: st.DataObject) -> None:
    """Walking down from the root, over tokens of three kinds so that many agree, siblings too."""
    size = len(up)
    tokens, chosen = ([data.draw(st.integers(0, 2)) for _ in range(size)] for _ in range(2))
    limit = data.draw(st.integers(0, size + 1))
    path, count = accepted(tree(torch.tensor(up)), *map(torch.tensor, ([tokens], [chosen], [limit])))
    right = [
        node
        for node in range(size)
        if all(tokens[child] == chosen[parent] for child, parent in pairwise(lineage(up, node)))
    ]
    depth = max(len(lineage(up, node)) for node in right if len(lineage(up, node)) <= max(limit, 1))
    best = next(node for node in right if len(lineage(up, node)) == depth)
    assert int(count) == (depth if limit else 0)
    assert path[0].tolist() == [*lineage(up, best)[::-1], *[0] * (size - depth)]


@settings(max_examples=60)
@given(st.integers(1, 12), st.data())
def test_a_chain_is_the_tree_whose_nodes_follow_one_another(size: int, data: st.DataObject) -> None:
    """Its shape, and what is committed of it; a limit of 0, and one that the chain outgrows, among the rows."""
    parent = torch.arange(-1, size - 1)
    assert is_chain(parent.tolist()) and not is_chain([-1, 0, 0])
    assert all(map(torch.equal, tree(parent), chain(parent)))
    tokens, chosen = (
        torch.tensor([[data.draw(st.integers(0, 1)) for _ in range(size)]] * 3) for _ in range(2)
    )
    limit = torch.tensor([0, data.draw(st.integers(1, size)), size + 1])
    path, count = accepted(tree(parent), tokens, chosen, limit)
    assert torch.equal(accepted_in_chain(tokens, chosen, limit), count)
    inside = torch.arange(size)[None] < count[:, None]
    assert torch.equal(torch.where(inside, path, 0), torch.where(inside, torch.arange(size)[None], 0))


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 8), st.lists(st.floats(0.01, 0.9), min_size=1, max_size=4))
def test_every_beginning_of_a_grown_tree_is_the_best_of_its_size(
    nodes: int, depth: int, rates: list[float]
) -> None:
    """Each node that is added is worth no more than those before it, and stands behind its parent."""
    rates = sorted(rates, reverse=True)
    grown = best_first(rates, 0.9, nodes, depth)
    assert grown[0] == -1 and all(0 <= up < node for node, up in enumerate(grown[1:], 1))
    assert max(len(lineage(list(grown), node)) - 1 for node in range(len(grown))) <= depth
    worth = [1.0]
    for node, up in enumerate(grown[1:], 1):
        level = len(lineage(list(grown), up)) - 1
        worth.append(worth[up] * rates[grown[:node].count(up)] * 0.9**level)
    assert worth == sorted(worth, reverse=True)


NO_LOGITS = torch.zeros(1)
"""For drafters that do not look at them."""


def memory(name: str, batch: int = 1) -> list[torch.Tensor]:
    made = []
    for state in load_drafter(name).states(GENERATION):
        shape = [batch if axis == "batch" else axis for axis in state.axes]
        made.append(torch.full(shape, state.initial, dtype=torch.int32))  # type: ignore[arg-type]
    return made


def copied(text: list[int]) -> tuple[int, list[int]]:
    """How many of a text's last three tokens occurred before, and what followed the newest such occurrence."""
    for words in (3, 2, 1):
        for end in range(len(text) - 1, words - 1, -1):
            if len(text) > words and text[end - words : end] == text[-words:]:
                return words, text[end:]
    return 0, []


@settings(max_examples=80)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=30))
def test_prompt_lookup_copies_what_followed(text: list[int]) -> None:
    """And once more what followed, where the text ends before the tree does; of nothing it is not confident."""
    drafter, size = load_drafter("prompt_lookup"), len(text)
    held = drafter.read(
        torch.tensor([[9, *text]]), torch.tensor([[-1, *range(size)]]), NO_LOGITS, *memory("prompt_lookup")
    )
    chain, root = tree(torch.tensor([-1, 0, 1, 2])), torch.tensor([text[-1]])
    words, after = copied(text)
    assert drafter.confidence(root, *held).tolist() == [words]
    got = drafter.propose(root, torch.tensor([size - 1]), chain, *held)
    if words:
        assert got[0].tolist() == [text[-1], *(after * 3)[:3]]
    else:
        assert got[0].tolist() == [text[-1], -1, -1, -1]
    places, last = torch.arange(size)[None], torch.tensor([size - 1])
    again = drafter.observe(Verified(got, NO_LOGITS, torch.tensor([text]), places, last), *held)
    assert all(map(torch.equal, held, again))  # what is committed is text as any other


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.integers(0, 99), st.booleans())
def test_logitspec_goes_on_from_every_candidate(text: list[int], seed: int, verified: bool) -> None:
    """The text's own lookup where there is one, then each candidate and what followed it; read or verified alike."""
    drafter, size = load_drafter("logitspec"), len(text)
    logits = torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(seed))
    tokens, places = torch.tensor([text]), torch.arange(size)[None]
    if verified:
        last = torch.tensor([2])
        held = drafter.observe(Verified(tokens, logits, tokens, places, last), *memory("logitspec"))
    else:
        held = drafter.read(tokens, places, logits[:, 2:3], *memory("logitspec"))
    shape, root = tree(torch.tensor([-1, 0, 0, 0, 1, 2, 3, 4, 5, 6])), torch.tensor([text[-1]])
    words, after = copied(text)
    assert drafter.confidence(root, *held).tolist() == [words + 1]
    chains = [(after * 3)[:3]] if words else []
    for token in [t for t in logits[0, 2].argsort(descending=True).tolist() if t != text[-1]]:
        _, behind = copied([*text, token])
        chains.append([token, *([*(behind * 2), -1, -1][:2])])
    (got,) = drafter.propose(root, torch.tensor([size - 1]), shape, *held).tolist()
    assert [got[0], *zip(got[1:4], got[4:7], got[7:10], strict=True)] == [text[-1], *map(tuple, chains[:3])]


def test_recycling_proposes_the_followers_it_has_seen() -> None:
    """Of two nodes with one token the last counts; a row of the batch reads what another wrote."""
    drafter, (table,) = load_drafter("token_recycling"), memory("token_recycling")
    tokens = torch.tensor([[1, 2, 1]])
    logits = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(0))
    none = torch.full((1, 3), -1)
    (table,) = drafter.observe(Verified(tokens, logits, tokens, none, torch.tensor([0])), table)
    order = logits[0].argsort(-1, descending=True)[:, :8].int()
    assert torch.equal(table[1], order[2]) and torch.equal(table[2], order[1])
    assert not table[3:].any() and not table[0].any()
    shape = tree(torch.tensor([-1, 0, 0, 1]))
    assert drafter.confidence(torch.tensor([1, 2, 3]), table).tolist() == [1, 1, 0]
    got = drafter.propose(torch.tensor([1, 2]), torch.tensor([5, 9]), shape, table)
    for row, root in enumerate((1, 2)):
        first, second = int(table[root, 0]), int(table[root, 1])
        assert got[row].tolist() == [root, first, second, int(table[first, 0])]


@settings(max_examples=30)
@given(parents().filter(lambda up: max(map(up.count, up)) <= 8), st.integers(0, 99))
def test_a_host_and_a_program_recycle_alike(up: list[int], seed: int) -> None:
    """Their tables are equal once every token was seen, and so is what they propose, as deep as a program goes."""
    generator = np.random.default_rng(seed)
    drafter, (table,) = load_drafter("token_recycling"), memory("token_recycling")
    host, plan = TokenRecycling(12), Plan(np.array(up))
    for verified, tokens in (
        (Plan.chain(12), generator.permutation(12)),
        (plan, generator.integers(0, 12, len(up))),
    ):
        logits = generator.standard_normal((len(tokens), 12), np.float32)
        accepted = Accepted(np.array([0]), tokens[:1])
        draft = Draft(verified, tokens, Drawn.DETERMINISTIC)
        host.write(HostVerified(draft, accepted, np.argsort(-logits, axis=1)[:, :8]))
        given = torch.from_numpy(tokens)[None]
        none = torch.full_like(given, -1)
        last = torch.tensor([0])
        (table,) = drafter.observe(Verified(given, torch.from_numpy(logits)[None], given, none, last), table)
    np.testing.assert_array_equal(table.numpy(), host.table)
    got = drafter.propose(torch.tensor([5]), torch.tensor([0]), tree(torch.tensor(up)), table)[0].numpy()
    shallow = plan.depth <= LEVELS
    np.testing.assert_array_equal(got[shallow], host.propose(plan, 5).tokens[shallow])


@pytest.mark.parametrize("name", DRAFTERS)
def test_padding_and_what_is_not_committed_leave_no_trace(name: str) -> None:
    drafter, held = load_drafter(name), memory(name)
    tokens, none = torch.tensor([[3, 4]]), torch.full((1, 2), -1)
    read = iter(drafter.read(tokens, none, torch.zeros(1, 1, 12), *held))
    states = load_drafter(name).states(GENERATION)
    after = [next(read) if learns_by_reading(s) else old for s, old in zip(states, held, strict=True)]
    assert drafter.confidence(tokens[:, 0], *after).tolist() == [0]
    for state, old, new in zip(states, held, after, strict=True):
        assert state.name == "repeat" or torch.equal(new, old)


@pytest.mark.parametrize("name", DRAFTERS)
def test_what_is_nearly_tied_is_compared_by_no_self_test(name: str) -> None:
    """Which tokens are the likeliest of many depends on rounding; which tokens were written does not."""
    states = load_drafter(name).states(GENERATION)
    outputs = [TensorSpec(state.name, state.dtype, state.axes, "state", state.name) for state in states]
    assert set(compared(outputs, states)) <= {"text", "repeat"}


def test_a_table_is_small() -> None:
    """At most 2 MB at SmolLM2's vocabulary and context."""
    states = load_drafter("hybrid").states(Generation(context=8192, vocabulary=49152))
    assert sum(4 * int(np.prod([a for a in s.axes if isinstance(a, int)])) for s in states) < 2e6


@pytest.mark.parametrize(("option", "value"), [("nodes", 0), ("nodes", 65), ("depth", 9)])
def test_options_out_of_range_are_refused(option: str, value: int) -> None:
    with pytest.raises(PassError, match=rf"{option}={value} must be 1 to"):
        Speculate(**{option: value})  # type: ignore[arg-type]


# --- lossy rules ------------------------------------------------------------------------------------------


class Numbered(Scripted):
    """Keeps a random number by which every decision would fall as it does."""

    def __init__(self, script: list[int]) -> None:
        super().__init__(script)
        self.numbers: list[float] = []

    def bernoulli(self, probability: float) -> bool:
        taken = super().bernoulli(probability)
        self.numbers.append(probability / 2 if taken else (1 + probability) / 2)
        return taken

    def draw(self, distribution: np.ndarray) -> int:
        token = super().draw(distribution)
        self.numbers.append(float(distribution[:token].sum() + distribution[token] / 2))
        return token


def every_outcome(rule: Rule, draft: Draft, p: np.ndarray) -> Iterator[tuple[Accepted, Numbered]]:
    """All that a host's rule may accept of a draft, with its decisions."""
    script: list[int] | None = []
    while script is not None:
        decisions = Numbered(script)
        yield rule.verify(draft, p, decisions), decisions
        script = next_script(decisions.taken, decisions.counts)


SHAPES = ([-1, 0, 1, 2], [-1, 0, 0, 0, 0], [-1, 0, 0, 1, 1, 2], [-1, 0, 1, 0, 3], [-1])
"""Trees: a chain, siblings, both, children before their parent's younger siblings, the root alone."""


def decided(
    rule: LossyRule, draft: Draft, near: np.ndarray, p: np.ndarray, numbers: np.ndarray, limit: int
) -> list[tuple[tuple[int, ...], list[int], int]]:
    """By a program, for every row of random numbers: the path, the tokens, and how many of the numbers it took."""
    rows = len(numbers)
    tokens = torch.from_numpy(draft.tokens)[None].expand(rows, -1)
    found = rule.decide(
        tree(torch.tensor(draft.tree.parent)),
        tokens,
        torch.from_numpy(near)[tokens],
        torch.from_numpy(p)[None].expand(rows, -1, -1),
        torch.from_numpy(numbers),
        torch.full((rows,), limit),
    )
    paths = [draft.tree.path(int(node)) for node in found.node]
    tokens_of = [
        [*draft.tokens[list(path[1:])], int(token)] for path, token in zip(paths, found.token, strict=True)
    ]
    return list(zip(paths, tokens_of, found.used.tolist(), strict=True))


def outcomes(
    host: Rule, rule: LossyRule, draft: Draft, known: np.ndarray, near: np.ndarray, p: np.ndarray, limit: int
) -> dict[tuple[int, ...], float]:
    """The distribution of what a program commits, proved to be what its host does of the nodes that are ``known``."""
    tree_, kept = draft.tree.keep(known)
    cut, inner = shallow(Draft(tree_, draft.tokens[kept], draft.drawn), limit)
    wanted = list(every_outcome(host, cut, p[kept[inner]]))
    numbers = np.full((len(wanted), draft.tree.nodes), 0.5, np.float32)
    for row, (_, decisions) in zip(numbers, wanted, strict=True):
        row[: len(decisions.numbers)] = decisions.numbers
    found: dict[tuple[int, ...], float] = defaultdict(float)
    got = decided(rule, draft, near, p, numbers, limit)
    for (path, tokens, used), (made, decisions) in zip(got, wanted, strict=True):
        assert path == tuple(kept[inner][made.path]) and tokens == made.tokens.tolist()
        assert used == len(decisions.numbers)
        found[tuple(tokens)] += decisions.probability
    return found


@pytest.mark.parametrize("up", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(9))
def test_lossy_rules_of_a_program_are_those_of_a_host(up: list[int], seed: int) -> None:
    """For every way in which decisions may fall, which are all that the probability of an output is made of.

    Of lantern at most ``delta`` moves, nothing where that is about 0. Tokens that siblings share, of which the first
    counts for it; zeros in a distribution; fewer tokens than a tree is deep, and trees of fewer nodes than a program
    has at most.
    """
    source, size = np.random.default_rng(seed), 6
    tokens, target = source.integers(0, size, len(up)), toy(size, seed, zeros=0.2)
    near = np.stack([[t for t in source.permutation(size) if t != token][:3] for token in range(size)])
    draft = Draft(Plan(np.array(up)), tokens, Drawn.DETERMINISTIC)
    twins = [any(up[j] == up[i] and tokens[j] == tokens[i] for j in range(i)) for i in range(len(up))]
    p = rows(target, draft).astype(np.float32)
    start = (int(tokens[0]),)
    for limit in (2, len(up) + 1):
        given = (near, p, limit)
        every = np.ones(len(up), bool)
        outcomes(HostTypical(0.6, 0.7), Typical(0.6, 0.7), draft, every, *given)
        for delta in (1e-9, (0.1, 0.2, 0.4)[seed % 3]):
            host, rule = HostLantern(near, delta), Lantern(len(up) + 2, delta, 3)
            first: dict[tuple[int, ...], float] = defaultdict(float)
            for text, weight in outcomes(host, rule, draft, ~np.array(twins), *given).items():
                first[text[:1]] += weight
            wanted = sequences(target, start, 1)
            assert sum(abs(first[text] - wanted[text]) for text in wanted) / 2 <= delta + 1e-6


@pytest.mark.parametrize(
    ("rule", "host"), [(Lantern(8, 0.2, 4), HostLantern(delta=0.2)), (Typical(0.3, 0.5), HostTypical())]
)
def test_a_program_says_as_its_host_how_a_text_changes(rule: LossyRule, host: Rule) -> None:
    assert rule.lossy == lossless(host, Drawn.DETERMINISTIC).reason


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"accept": "lantern", "nodes": 1}, "nodes=1 proposes nothing that accept=lantern could accept"),
        ({"accept": "typical", "nodes": 1}, "nodes=1 proposes nothing that accept=typical could accept"),
        ({"delta": 0.2}, "delta is for accept=lantern"),
        ({"accept": "lantern", "alpha": 0.2}, "alpha is for accept=typical"),
        ({"accept": "lantern", "delta": 0.0}, "delta=0 must be above 0"),
        ({"accept": "typical", "epsilon": 1.5}, "epsilon=1.5 must be above 0 and at most 1"),
        ({"accept": "lantern", "neighbours": 0}, "neighbours=0 must be 1 to"),
    ],
)
def test_options_of_another_rule_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(PassError, match=said):
        Speculate(**given)
