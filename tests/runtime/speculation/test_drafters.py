"""Drafters against naive versions of themselves, which look through the whole text each time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.speculation.simulation import DRAFTERS
from tests.runtime.speculation.toys import branches
from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Uniforms
from tokopt.runtime.speculation.draft import Draft, Drawn
from tokopt.runtime.speculation.drafters.base import Drafter, TextDrafter, Verified
from tokopt.runtime.speculation.drafters.hybrid import Hybrid
from tokopt.runtime.speculation.drafters.logitspec import LogitSpec
from tokopt.runtime.speculation.drafters.lookahead import Lookahead
from tokopt.runtime.speculation.drafters.occurrences import Corpus
from tokopt.runtime.speculation.drafters.prompt_lookup import PromptLookup
from tokopt.runtime.speculation.drafters.suffix import Suffix
from tokopt.runtime.speculation.drafters.token_recycling import TokenRecycling
from tokopt.runtime.speculation.rules.base import Accepted
from tokopt.runtime.speculation.tree import Tree

NONE = Uniforms(np.array([]))
SIZE = 4

texts = st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=24)
budgets = st.integers(1, 8)


def plain(root: int, *tokens: int, top: list[list[int]] | None = None) -> Verified:
    """A call that verified the root alone, as far as its drafts tell, and committed some tokens."""
    draft = Draft(Tree.chain(len(tokens)), np.array([root, *tokens[:-1]]), Drawn.DETERMINISTIC)
    return Verified(
        draft, Accepted(np.arange(len(tokens)), np.array(tokens)), None if top is None else np.array(top)
    )


def split(drafter: Drafter, text: list[int], cuts: list[int]) -> TextDrafter:
    """A drafter that got a text in parts: the first as the prompt, the others as committed tokens."""
    places = sorted({min(max(cut, 1), len(text)) for cut in cuts} | {len(text)})
    opened = drafter.open(text[: places[0]])
    for start, end in itertools.pairwise(places):
        rows = [[t % SIZE for t in range(drafter.tops)]] * (end - start)
        opened.observe(plain(text[start - 1], *text[start:end], top=rows if drafter.tops else None))
    return opened


def by_paths(draft: Draft) -> list[tuple[int, ...]]:
    """The tokens below the root on the way to every node."""
    return [tuple(draft.tokens[list(draft.tree.path(n)[1:])].tolist()) for n in range(1, draft.tree.nodes)]


cuts = st.lists(st.integers(1, 24), max_size=4)


# Prompt lookup


def looked_up(text: list[int], longest: int, most: int, *ahead: int) -> list[int]:
    """The tokens of the text after the first occurrence of the longest last n-gram, with ``ahead`` behind the text."""
    whole = [*text, *ahead]
    for n in range(min(longest, len(text)), 0, -1):
        for start in range(len(text) - n):
            if text[start : start + n] == whole[-n:]:
                return text[start + n : start + n + most]
    return []


@given(texts, cuts, st.integers(1, 4), budgets)
def test_prompt_lookup_copies_what_followed_first(
    text: list[int], cuts: list[int], n: int, nodes: int
) -> None:
    draft = split(PromptLookup(n), text, cuts).propose(Tree.chain(nodes), NONE)
    assert draft.tokens.tolist() == [text[-1], *looked_up(text, n, nodes - 1)]
    assert draft.tree.parent.tolist() == Tree.chain(draft.tree.nodes).parent.tolist()


# Token Recycling


@given(st.integers(0, 1000))
def test_token_recycling_keeps_the_last_node_of_a_token(seed: int) -> None:
    source = np.random.default_rng(seed)
    drafter, naive = TokenRecycling(6, 3), dict[int, list[int]]()
    for _ in range(4):  # requests: the table outlives them
        prompt = source.integers(6, size=3).tolist()
        text, root = drafter.open(prompt), prompt[-1]
        for _ in range(4):
            nodes = int(source.integers(1, 9))
            plan = Tree(np.array([-1, *(source.integers(max(0, n - 3), n) for n in range(1, nodes))]))
            draft = text.propose(plan, NONE)
            wanted: dict[tuple[int, ...], int] = {}
            for node in range(nodes):
                path, token = plan.path(node)[1:], root
                for below in path:
                    row = naive.get(token)
                    token = -1 if row is None else row[int(plan.rank[below])]
                    if token < 0:
                        break
                else:
                    wanted[path] = token
            kept = sorted(wanted, key=lambda path: path[-1:] or (0,))
            assert draft.tokens.tolist() == [wanted[path] for path in kept]

            top = np.stack([source.permutation(6)[:3] for _ in range(draft.tree.nodes)])
            path = draft.tree.path(int(source.integers(draft.tree.nodes)))  # accepted or not, all nodes write
            tokens = np.append(draft.tokens[list(path[1:])], source.integers(6))
            text.observe(Verified(draft, Accepted(np.array(path), tokens), top))
            for node, token in enumerate(draft.tokens.tolist()):
                naive[token] = top[node].tolist()
            root = int(tokens[-1])
    for token in range(6):
        assert drafter.table[token].tolist() == naive.get(token, [-1] * 3)


def test_a_tree_is_verified_before_it_is_written() -> None:
    """A proposal reads the table of before the call, also where the call writes the rows that it read."""
    drafter = TokenRecycling(5, 2)
    text = drafter.open([0])
    text.observe(plain(0, 1, top=[[1, 2]]))
    text.observe(plain(1, 0, top=[[0, 3]]))
    plan = Tree(np.array([-1, 0, 0, 1, 1, 2]))
    draft = text.propose(plan, NONE)
    assert draft.tokens.tolist() == [0, 1, 2, 0, 3], "nothing is known after token 2"
    assert draft.tree.parent.tolist() == [-1, 0, 0, 1, 1]
    top = np.array([[4, 1], [3, 2], [0, 1], [2, 4], [1, 0]])
    text.observe(Verified(draft, Accepted(np.array([0]), np.array([4])), top))
    assert drafter.table.tolist() == [[2, 4], [3, 2], [0, 1], [1, 0], [-1, -1]]
    assert text.propose(plan, NONE).tokens.tolist() == [4], "the first call after token 4"


def test_rows_share_the_table_and_its_size_is_known() -> None:
    drafter = TokenRecycling(49152)
    assert drafter.table.dtype == np.int32 and drafter.table.nbytes == 1_572_864 < 2_000_000
    assert "1,572,864" in (TokenRecycling.__doc__ or "")
    one, other = drafter.open([7]), drafter.open([8])
    one.observe(plain(7, 8, top=[list(range(8))]))
    assert other.propose(Tree.chain(2), NONE).tokens.tolist() == [8]
    other.observe(plain(8, 7, top=[list(range(10, 18))]))
    assert other.propose(Tree.chain(2), NONE).tokens.tolist() == [7, 0]
    assert one.propose(Tree.chain(2), NONE).tokens.tolist() == [8, 10]


@pytest.mark.parametrize(
    ("top", "reason"),
    [
        ([[0]], "takes 2 ids"),
        ([[0, 5]], "ids below 5"),
        ([[-1, 0]], "ids below 5"),
        (None, "give them as top"),
    ],
)
def test_token_recycling_refuses_other_ids(top: list | None, reason: str) -> None:
    text = TokenRecycling(5, 2).open([0])
    with pytest.raises(InputError, match=reason):
        text.observe(plain(0, 1, top=top))


def test_a_plan_wider_than_the_table_is_refused() -> None:
    with pytest.raises(InputError, match="3 children at a node, the table 2"):
        TokenRecycling(5, 2).open([0]).propose(Tree(np.array([-1, 0, 0, 0])), NONE)


# Suffix decoding


def counted(corpus: list[list[int]], context: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where a context occurs in some texts: the text and the place behind, in order."""
    n = len(context)
    return [
        (i, end)
        for i, text in enumerate(corpus)
        for end in range(n, len(text) + 1)
        if tuple(text[end - n : end]) == context
    ]


def children(corpus: list[list[int]], context: tuple[int, ...]) -> list[tuple[int, float]]:
    """The tokens that follow a context with their shares: the most frequent first, then the one that followed last."""
    places = counted(corpus, context)
    after = [(place, corpus[place[0]][place[1]]) for place in places if place[1] < len(corpus[place[0]])]
    tokens = {token for _, token in after}
    shares = {token: sum(t == token for _, t in after) / len(places) for token in tokens}
    last = {token: max(place for place, t in after if t == token) for token in tokens}
    return [
        (t, shares[t])
        for t in sorted(sorted(tokens, key=lambda t: last[t], reverse=True), key=lambda t: -shares[t])
    ]


def naive_tree(corpus: list[list[int]], context: tuple[int, ...], most: int, least: float):
    """The most probable continuations, one after the other, and the sum of their probabilities."""
    chosen: list[tuple[int, ...]] = []
    frontier = [((token,), share) for token, share in children(corpus, context)]
    score = 0.0
    while frontier and len(chosen) < most:
        best = max(range(len(frontier)), key=lambda i: (frontier[i][1], -i))
        path, probability = frontier.pop(best)
        if probability < least:
            break
        chosen.append(path)
        score += probability
        frontier += [((*path, t), probability * share) for t, share in children(corpus, (*context, *path))]
    return chosen, score


def naive_suffix(text: list[int], corpus: list[list[int]], longest: int, nodes: int, least: float):
    """The best over all match lengths, the corpus before the text and short before long: later equals replace."""
    best, score = [], 0.0
    for source in (corpus, [text]):
        for length in range(1, min(longest, len(text)) + 1):
            if not children(source, tuple(text[-length:])):
                break
            found = naive_tree(source, tuple(text[-length:]), min(nodes - 1, length), least)
            if found[1] >= score - 1e-12:
                best, score = found
    return best


corpora = st.lists(st.lists(st.integers(0, SIZE - 1), max_size=12), max_size=3)


@settings(max_examples=150)
@given(texts, cuts, corpora, st.integers(1, 6), budgets, st.sampled_from([0.1, 0.4]))
def test_suffix_proposes_the_best_tree_of_counts(
    text: list[int], cuts: list[int], corpus: list[list[int]], longest: int, nodes: int, least: float
) -> None:
    drafter = Suffix(SIZE, Corpus(corpus), longest=longest, least=least)
    draft = split(drafter, text, cuts).propose(Tree.chain(nodes), NONE)
    assert by_paths(draft) == naive_suffix(text, corpus, longest, nodes, least)
    assert draft.tokens[0] == text[-1] and draft.q is None


@given(texts, corpora, st.integers(1, 6))
def test_q_counts_an_occurrence_as_often_as_tokens_match(
    text: list[int], corpus: list[list[int]], longest: int
) -> None:
    opened = Suffix(SIZE, Corpus(corpus), longest=longest).open(text)
    for ahead in ((), (1,), (2, 3)):
        weights = np.zeros(SIZE)
        context = (*text, *ahead)
        for source in [*corpus, text]:
            for place in range(1, len(source)):
                match = 0
                while match < min(longest, place) and source[place - 1 - match] == context[-1 - match]:
                    match += 1
                    if match == len(context):
                        break
                weights[source[place]] += match
        q = opened.next_token((text[-1], *ahead))
        np.testing.assert_allclose(q, weights / max(weights.sum(), 1))


@pytest.mark.parametrize("drawn", [Drawn.INDEPENDENT, Drawn.WITHOUT_REPLACEMENT, Drawn.TOP_AND_ONE])
def test_drawn_suffixes_follow_q(drawn: Drawn) -> None:
    text, plan = [0, 1, 0, 2, 0, 1, 0, 3, 0], Tree(np.array([-1, 0, 0, 1]))
    opened = Suffix(SIZE, None, drawn).open(text)
    first = np.zeros(SIZE)
    for draft, weight in branches(lambda decisions: opened.propose(plan, decisions)):
        assert draft.drawn is drawn and draft.q is not None
        first[draft.tokens[1]] += weight
        for node in range(draft.tree.nodes):
            if not draft.tree.children[node]:
                continue
            path = tuple(draft.tokens[list(draft.tree.path(node))].tolist())
            np.testing.assert_array_equal(draft.q[node], opened.next_token(path))
            for child in draft.tree.children[node]:
                assert draft.q[node][draft.tokens[child]] > 0
    q = opened.next_token((0,))
    wanted = q if drawn is not Drawn.TOP_AND_ONE else np.eye(SIZE)[q.argmax()]
    np.testing.assert_allclose(first, wanted, atol=1e-12)


def test_a_suffix_that_never_occurred_draws_nothing() -> None:
    opened = Suffix(SIZE, None, Drawn.WITHOUT_REPLACEMENT).open([0, 1, 2])
    assert opened.propose(Tree.chain(4), NONE).tree.nodes == 1


def test_a_corpus_is_known_from_the_first_token() -> None:
    drafter = Suffix(10, Corpus([[1, 2, 3, 4], [2, 3, 5], [9]]))
    draft = drafter.open([7, 2, 3]).propose(Tree.chain(5), NONE)
    assert by_paths(draft) == [(5,), (4,)], "equal counts: what followed last comes first"
    assert drafter.open([4]).propose(Tree.chain(5), NONE).tree.nodes == 1, "texts of a corpus do not run on"


def test_equal_scores_of_the_text_win() -> None:
    drafter = Suffix(10, Corpus([[1, 2], [1, 2], [1, 2]]))
    assert by_paths(drafter.open([1]).propose(Tree.chain(2), NONE)) == [(2,)]
    certain = Suffix(10, Corpus([[1, 2], [1]]), least=0.1)
    assert by_paths(certain.open([1, 3, 1]).propose(Tree.chain(2), NONE)) == [(3,)], "a half on both sides"


# Lookahead


class NaiveLookahead:
    """The same, with guesses by their absolute position."""

    def __init__(self, window: int, level: int, guesses: int, prompt: list[int]) -> None:
        self.sizes, self.text, self.prompt, self.given = (
            (window, level, guesses),
            list(prompt),
            list(prompt),
            0,
        )
        self.grams: list[tuple[int, ...]] = []
        self.note(range(level, len(prompt) + 1))
        self.calls = [dict[int, int]() for _ in range(level - 1)]
        self.complete()

    def note(self, ends) -> None:
        """Take n-grams of the text."""
        level = self.sizes[1]
        self.grams += [tuple(self.text[end - level : end]) for end in ends if end >= level]

    def complete(self) -> None:
        """Guesses for every position of the window that has none."""
        for late, guesses in enumerate(self.calls):
            for column in range(self.sizes[0]):
                place = len(self.text) + column + late
                if place not in guesses:
                    guesses[place] = self.prompt[self.given % len(self.prompt)]
                    self.given += 1

    def columns(self) -> list[list[int]]:
        """Column by column, the guesses of the calls for one position after the other."""
        return [
            [guesses[len(self.text) + column + late] for late, guesses in enumerate(self.calls)]
            for column in range(self.sizes[0])
        ]

    def follow(self) -> list[tuple[int, ...]]:
        """What followed the root, last first, each once."""
        seen: list[tuple[int, ...]] = []
        for gram in reversed(self.grams):
            if gram[0] == self.text[-1] and gram[1:] not in seen:
                seen.append(gram[1:])
        return seen[: self.sizes[2]]

    def observe(self, newest: list[int], tokens: list[int]) -> None:
        """Newest guesses per computed column, and committed tokens."""
        late = len(self.text) + self.sizes[1] - 1
        for column, token in enumerate(newest):
            self.grams.append((*self.columns()[column], token))
        if newest:
            self.calls = [*self.calls[1:], {late + column: token for column, token in enumerate(newest)}]
        before = len(self.text)
        self.text += tokens
        self.note(range(before + 1, len(self.text) + 1))
        self.complete()


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 4), st.integers(1, 3))
def test_lookahead_moves_its_window_with_the_text(seed: int, window: int, level: int, guesses: int) -> None:
    source = np.random.default_rng(seed)
    prompt = source.integers(5, size=source.integers(1, 7)).tolist()
    text, naive = (
        Lookahead(window, level, guesses).open(prompt),
        NaiveLookahead(window, level, guesses, prompt),
    )
    for _ in range(8):
        nodes = int(source.integers(1, 30))
        draft = text.propose(Tree.chain(nodes), NONE)
        paths = by_paths(draft)
        assert len(set(paths)) == len(paths) == draft.tree.nodes - 1 < nodes
        share = 1 + (nodes - 1) // 2
        wanted: list[tuple[int, ...]] = []

        def add(path: tuple[int, ...], most: int, wanted=wanted) -> bool:
            for n in range(1, len(path) + 1):
                if path[:n] not in wanted:
                    if len(wanted) + 1 >= most:
                        return False
                    wanted.append(path[:n])
            return True

        for gram in naive.follow():
            add(gram, share)
        ends: list[tuple[int, ...]] = []
        prefix: tuple[int, ...] = ()
        for column in naive.columns():
            if not add((*prefix, *column), nodes):
                break
            ends.append((*prefix, *column))
            prefix = (*prefix, column[0])
        assert paths == wanted

        top = source.integers(5, size=(draft.tree.nodes, 1))
        path = draft.tree.path(int(source.integers(draft.tree.nodes)))
        tokens = np.append(draft.tokens[list(path[1:])], source.integers(5))
        text.observe(Verified(draft, Accepted(np.array(path), tokens), top))
        naive.observe([int(top[1 + paths.index(end), 0]) for end in ends], tokens.tolist())


# LogitSpec


@given(texts, st.permutations(range(SIZE)), st.integers(1, 3), st.integers(1, 12))
def test_logitspec_extends_the_other_candidates(text: list[int], top: list[int], n: int, nodes: int) -> None:
    """The candidates are those of the place where the root was chosen, the root itself aside."""
    whole = [0, *text]
    accepted = min(2, len(text))  # the ids after the last node that was accepted count
    opened = LogitSpec(n, tops=3).open(whole[:-accepted])
    rows = [[0, 1, 2, 3]] * (accepted - 1) + [top]
    opened.observe(plain(whole[-accepted - 1], *whole[-accepted:], top=rows))
    paths: list[tuple[int, ...]] = []
    guesses = [t for t in top[:3] if t != whole[-1]]
    chains = [looked_up(whole, n, 20)]
    chains += [[t, *looked_up(whole, n, 3, t)] for t in guesses]
    for chain in chains:
        for end in range(1, len(chain) + 1):
            path = tuple(chain[:end])
            if path not in paths:
                if len(paths) + 1 >= nodes:
                    break
                paths.append(path)
    assert by_paths(opened.propose(Tree.chain(nodes), NONE)) == paths


def test_logitspecs_chains_shorten_with_the_rank() -> None:
    """Forty candidates that all occurred, each with a long continuation of its own."""
    prompt = [token for guess in range(40) for token in (guess, *range(100 + 10 * guess, 106 + 10 * guess))]
    opened = LogitSpec(tops=40).open([*prompt, 900])
    opened.observe(plain(900, 901, top=[list(range(40))]))
    depths = [int(d) for d in opened.propose(Tree.chain(1000), NONE).tree.depth]
    ends = [a for a, b in zip(depths[1:], [*depths[2:], 1], strict=True) if b == 1]
    assert ends == [4] * 8 + [3] * 24 + [1] * 8


# Hybrid


@given(texts, st.integers(1, 5), budgets)
def test_hybrid_takes_the_suffix_where_enough_tokens_match(text: list[int], least: int, nodes: int) -> None:
    recycling = TokenRecycling(SIZE, 2)
    recycling.table[:] = [[1, 2], [2, 3], [3, 0], [0, 1]]
    suffix, plan = Suffix(SIZE), Tree((np.arange(nodes) - 1) // 2)
    longest = 0
    while longest < len(text) - 1 and counted([text[:-1]], tuple(text[-longest - 1 :])):
        longest += 1
    chosen = suffix if longest >= least else recycling
    draft = Hybrid(suffix, recycling, least).open(text).propose(plan, NONE)
    assert by_paths(draft) == by_paths(chosen.open(text).propose(plan, NONE))


def test_hybrid_observes_with_both() -> None:
    drafter = DRAFTERS["hybrid"](SIZE)
    assert isinstance(drafter, Hybrid) and drafter.tops == 4
    text = drafter.open([0, 1])
    text.observe(plain(1, 2, 0, top=[[2, 1, 0, 3], [0, 1, 2, 3]]))
    assert text.suffix.history.tokens.tolist() == [0, 1, 2, 0]
    assert drafter.recycling.table[1:3].tolist() == [[2, 1, 0, 3], [0, 1, 2, 3]] and text.recycling.root == 0


# All


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("prompt", [[], [-1], [0.5], "ab", None])
def test_what_is_no_prompt_is_refused(name: str, prompt: object) -> None:
    with pytest.raises(InputError, match="prompt"):
        DRAFTERS[name](SIZE).open(prompt)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", [name for name in DRAFTERS if "suffix" in name or "recycling" in name or name == "hybrid"]
)
def test_tokens_outside_of_the_vocabulary_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="the prompt has token 4"):
        DRAFTERS[name](SIZE).open([0, SIZE])


@pytest.mark.parametrize(
    "make",
    [
        lambda: PromptLookup(0),
        lambda: TokenRecycling(0),
        lambda: TokenRecycling(4, 5),
        lambda: Suffix(0),
        lambda: Suffix(4, drawn="independent"),  # type: ignore[arg-type]
        lambda: Suffix(4, least=0),
        lambda: Suffix(4, factor=0),
        lambda: Suffix(4, longest=0),
        lambda: Suffix(4, Corpus([[4]])),
        lambda: Lookahead(window=0),
        lambda: Lookahead(level=1),
        lambda: Lookahead(guesses=0),
        lambda: LogitSpec(0),
        lambda: Hybrid(Suffix(4), TokenRecycling(4, 2), 0),
        lambda: Hybrid(Suffix(4, drawn=Drawn.INDEPENDENT), TokenRecycling(4, 2)),
    ],
)
def test_options_out_of_range_are_refused(make) -> None:
    with pytest.raises(InputError):
        make()
