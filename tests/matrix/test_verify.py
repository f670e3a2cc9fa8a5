"""A model that verifies what a host proposes writes the text that it writes alone, and keeps the cache of that text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokopt
from tests.matrix.language import artifact, bundle, model, prompt
from tests.pages import ROOT
from tests.passes.test_speculate import copied
from tests.runtime.renaming import random_words, renamed
from tests.zoo.decoders import CONTEXT, VOCABULARY
from tokopt.errors import InputError, PassError
from tokopt.passes import Speculate
from tokopt.passes.speculate.drafters import DRAFTERS as IN_GRAPH
from tokopt.passes.speculate.neighbours import nearest
from tokopt.runtime import LanguageModel, Sampling, load
from tokopt.runtime.format.state import slot_axis
from tokopt.runtime.loop import Request
from tokopt.runtime.sampling import softmax
from tokopt.runtime.speculation.decisions import Decisions
from tokopt.runtime.speculation.draft import Draft, Drawn
from tokopt.runtime.speculation.drafters.base import Verified
from tokopt.runtime.speculation.drafters.occurrences import Corpus
from tokopt.runtime.speculation.drafters.suffix import Suffix
from tokopt.runtime.speculation.lossless import lossless
from tokopt.runtime.speculation.named import DRAFTERS, RULES, Verification, make_drafter, read_rule
from tokopt.runtime.speculation.rules.lantern import Lantern
from tokopt.runtime.speculation.tree import Tree

CASES = (("llama", ""), ("mistral", "adakv{press=h2o{budget=48 every=8}}"))
"""Decoder, and the passes before: windows, heads with lengths of their own, triggers in the middle."""

OPTIONS = (Sampling(), Sampling(temperature=0.7, top_k=5, repetition_penalty=1.2, seed=1))

PROMPTS = [prompt(7) * 4, prompt(3, seed=3), prompt(17, seed=17)]

LOSSY = ("typical", "lantern")

VERIFY = "verify{neighbours=6}"
"""With what the rule ``lantern`` reads."""

cases = pytest.mark.parametrize(("name", "passes"), CASES)


def verifying(name: str, passes: str = "") -> LanguageModel:
    return artifact(name, f"{passes},{VERIFY}" if passes else VERIFY)


@cache
def plain_texts(name: str, passes: str, sampling: Sampling) -> Any:
    return artifact(name, passes).generate(PROMPTS, max_tokens=60, sampling=sampling)


# ------------------------------------------------------------------------------------------------- texts


@cases
@pytest.mark.filterwarnings("ignore:.*about none was accepted")
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_drafter_changes_no_token(name: str, passes: str, drafter: str) -> None:
    """Greedily and drawn, with rows that advance by different numbers of tokens."""
    model = verifying(name, passes)
    for sampling in OPTIONS:
        got = model.generate(PROMPTS, max_tokens=60, sampling=sampling, drafter=drafter, nodes=12)
        assert got == plain_texts(name, passes, sampling) and got[0].lossless.holds
        if not sampling.temperature:
            assert got[0].statistics.tokens_per_call > 1.15
        assert 0 < got[0].statistics.drafting_seconds < got[0].statistics.decode_seconds


@pytest.mark.filterwarnings("ignore:.*about none was accepted")
def test_the_number_of_nodes_changes_no_token() -> None:
    """As many as are fastest, which depends on the machine; one, which proposes nothing; rows alone, too."""
    model, wanted = verifying("llama"), plain_texts("llama", "", OPTIONS[0])
    for nodes in (None, 1, 64):
        assert model.generate(PROMPTS, max_tokens=60, drafter="hybrid", nodes=nodes) == wanted
    for ids, row in zip(PROMPTS, wanted, strict=True):
        assert model.generate(ids, max_tokens=60, drafter="suffix") == row
    assert model.generate(PROMPTS, max_tokens=60) == wanted


def test_with_kernels_several_nodes_round_as_one() -> None:
    """Weights in blocks, and an attention that gives a token the same bits alone and among others."""
    model = verifying("llama", "rtn{group=16}")
    if not model.kernels.library:
        pytest.skip(str(model.kernels))
    request, ids = model.open(1, 64), PROMPTS[0]
    request.prefill([ids])
    tree = Tree(np.array([-1, 0, 0, 1, 2, 3]))
    tokens = np.arange(6)
    logits = request.verify(tokens[None], len(ids) + tree.depth[None], tree.mask[None])
    for leaf in (4, 5):
        alone = model.open(1, 64)
        alone.prefill([ids])
        for depth, node in enumerate(tree.path(leaf)):
            found = alone.step(tokens[None, node : node + 1], np.array([[len(ids) + depth]])).logits
            np.testing.assert_array_equal(found[0, 0], logits[0, node])  # type: ignore[index]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_texts_end_at_their_length(count: int) -> None:
    got = verifying("llama").generate(PROMPTS, max_tokens=count, drafter="suffix", nodes=8)
    assert [row.tokens for row in got] == [row.tokens[:count] for row in plain_texts("llama", "", OPTIONS[0])]


def test_an_end_token_within_a_commit_ends_the_text() -> None:
    model = load(verifying("llama").path, threads=1)
    assert isinstance(model, LanguageModel)
    text = plain_texts("llama", "", OPTIONS[0])[0].tokens
    for end in (text[7], text[40]):
        model.settings = replace(model.settings, eos=(end,))
        got = model.generate(PROMPTS[0], max_tokens=60, drafter="suffix", nodes=8)
        assert got.tokens == text[: text.index(end) + 1] and got.finish == "stop"


def test_a_text_goes_on_to_the_end_of_the_context() -> None:
    """Of a model with an embedding for every position: nodes that are too deep have none."""
    ids = prompt(7) * 44
    plain = artifact("gpt2").generate(ids, max_tokens=99)
    got = verifying("gpt2").generate(ids, max_tokens=99, drafter="prompt_lookup", nodes=8)
    assert got == plain and len(ids) + len(got.tokens) == CONTEXT


def test_a_stream_that_is_left_leaves_no_state() -> None:
    model, wanted = verifying("llama"), plain_texts("llama", "", OPTIONS[0])[0].tokens
    stream = model.tokens(PROMPTS[0], max_tokens=60, drafter="suffix", nodes=8)
    assert tuple(token for token, _ in zip(stream, range(5), strict=False)) == wanted[:5]
    assert model.generate(PROMPTS[0], max_tokens=60, drafter="suffix").tokens == wanted


def test_names_carry_no_meaning(tmp_path: Path) -> None:
    """Programs, states and inputs with other names, that of the program which commits among them."""
    model = load(renamed(verifying("llama").path, tmp_path / "renamed", random_words(0)), threads=1)
    assert isinstance(model, LanguageModel) and model.manifest.schedule.commit != "commit"
    got = model.generate(PROMPTS, max_tokens=60, drafter="token_recycling", nodes=8)
    assert got == plain_texts("llama", "", OPTIONS[0]) and got[0].statistics.tokens_per_call > 1.1


def test_processors_see_the_text_down_to_every_node() -> None:
    """One that forbids what the last tokens of each row say, and one that fails."""

    def forbid(history: Sequence[Sequence[int]], logits: np.ndarray) -> np.ndarray:
        assert len(history) == len(logits) == len(PROMPTS)
        for row, ids in zip(logits, history, strict=True):
            row[[ids[-1], ids[-2], (ids[-1] + len(ids)) % VOCABULARY]] = -np.inf
        return logits

    for sampling in OPTIONS:
        options: Any = {"max_tokens": 40, "sampling": sampling, "processors": [forbid]}
        wanted = artifact("llama").generate(PROMPTS, **options)
        assert wanted != plain_texts("llama", "", sampling)
        assert verifying("llama").generate(PROMPTS, **options, drafter="token_recycling", nodes=8) == wanted

    def fail(history: Sequence[Sequence[int]], logits: np.ndarray) -> np.ndarray:
        return logits if len(history[0]) < len(PROMPTS[0]) + 3 else logits[:, 1:]

    with pytest.raises(InputError, match=r"processor 0 \(fail\) at step [23] returned logits of shape"):
        verifying("llama").generate(PROMPTS[0], processors=[fail], drafter="suffix", nodes=8)


# ------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_says_whether_it_is_lossless(rule: str) -> None:
    """``suffix`` draws for rules that weigh drafts; without a temperature all but lossy rules write the greedy text."""
    model = verifying("llama")
    got = model.generate(PROMPTS, max_tokens=30, drafter="suffix", accept=rule, nodes=6)
    made = read_rule(rule)
    verdict = lossless(made, make_drafter("suffix", VOCABULARY, made).drawn)
    assert {row.lossless for row in got} == {verdict}
    assert verdict.holds != bool(verdict.reason) and verdict.holds == (rule not in LOSSY)
    if verdict.holds:
        assert [row.tokens for row in got] == [
            row.tokens[:30] for row in plain_texts("llama", "", OPTIONS[0])
        ]
    if rule != "greedy":
        sampling = Sampling(temperature=1.0, seed=4)
        ways = [
            model.generate(PROMPTS, max_tokens=9, drafter="suffix", accept=rule, nodes=6, sampling=sampling)
            for _ in range(2)
        ]
        assert ways[0] == ways[1]


def test_lantern_takes_the_neighbours_that_the_model_says() -> None:
    """As with a table of the nearest embeddings; a model that says none is refused."""
    given, sampling = verifying("llama"), Sampling(temperature=1.0, seed=4)
    table = nearest(model("llama").get_input_embeddings().weight, 6).numpy()  # type: ignore[operator]
    texts = [
        given.generate(
            PROMPTS,
            max_tokens=30,
            drafter=make_drafter("token_recycling", VOCABULARY, Lantern()),
            accept=rule,
            nodes=8,
            sampling=sampling,
        )
        for rule in ("lantern", Lantern(table), Lantern(delta=0.0), Lantern(table, 0.0))
    ]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert [row[0].lossless.holds for row in texts] == [False, False, True, True]
    with pytest.raises(InputError, match=r"make it with verify\{neighbours=16\}"):
        Verification("here", given.settings).method("suffix", "lantern", None, 1.0)


class Copying:
    """Drafts as the program's ``prompt_lookup``: what followed the newest occurrence, over and over."""

    name, drawn, fills, tops = "copying", Drawn.DETERMINISTIC, False, 0

    def __init__(self, text: Sequence[int] = ()) -> None:
        self.text = list(text)

    def open(self, prompt: Sequence[int]) -> Copying:
        return Copying(prompt)

    def propose(self, plan: Tree, decisions: Decisions) -> Draft:
        _, after = copied(self.text)
        tokens = [self.text[-1], *(after * plan.nodes)[: plan.nodes - 1]]
        return Draft(Tree.chain(len(tokens)), np.array(tokens), self.drawn)

    def observe(self, verified: Verified) -> None:
        self.text += verified.accepted.tokens.tolist()


@pytest.mark.parametrize("rule", ["typical", "lantern{neighbours=6}"])
def test_a_program_with_a_lossy_rule_writes_what_its_host_would(rule: str) -> None:
    """The same proposals, random numbers and rule: the same texts, and the same is said of them."""
    name, _, options = rule.rstrip("}").partition("{")
    fast, sampling = (
        artifact("llama", f"speculate{{accept={name} {options}}}"),
        Sampling(1.0, top_k=4, seed=4),
    )
    got = fast.generate(PROMPTS, max_tokens=40, nodes=8, sampling=sampling)
    want = verifying("llama").generate(
        PROMPTS, max_tokens=40, drafter=Copying(), accept=name, nodes=8, sampling=sampling
    )
    assert got == want and got[0].statistics.tokens_per_call > 1.1
    assert got[0].lossless == want[0].lossless and not got[0].lossless.holds
    assert fast.manifest.semantics == "approximate"
    greedy = fast.generate(PROMPTS, max_tokens=60, nodes=8)
    assert greedy == plain_texts("llama", "", Sampling())
    alone = fast.generate(PROMPTS[0], max_tokens=4, nodes=1, sampling=sampling)
    assert alone.lossless.holds == (name == "lantern")  # a token alone is drawn as without


@pytest.mark.parametrize("rule", ["without_replacement", "deterministic"])
def test_drawn_tokens_follow_the_model(rule: str) -> None:
    """Chi-square of the three tokens after a prompt, over rows of 1,024 streams.

    The model draws from three tokens at each place, and drafts are continuations that the drafter knows beforehand.
    """
    ids, rows, sampling = PROMPTS[0], 1024, Sampling(temperature=2.0, top_k=3, seed=5)
    model = verifying("llama")
    expected = probabilities(artifact("llama"), ids, sampling)
    drawn = Drawn.DETERMINISTIC if rule == "deterministic" else Drawn.WITHOUT_REPLACEMENT
    drafter = Suffix(VOCABULARY, Corpus([*map(list, expected)]), drawn, least=0.01)
    got = model.generate([ids] * rows, max_tokens=3, sampling=sampling, drafter=drafter, accept=rule, nodes=6)
    found = Counter(row.tokens for row in got)
    assert set(found) <= set(expected) and len(expected) == 27
    assert got[0].statistics.tokens_per_call > 1.15
    chi = sum((found[text] - rows * p) ** 2 / (rows * p) for text, p in expected.items())
    assert chi < 58  # of 26 degrees of freedom it is larger once in 3,000 seeds; this seed is always the same


def probabilities(model: LanguageModel, ids: list[int], sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Of every three tokens that may follow."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for text, weight in found.items():
            logits: Any = model.open(1, 64).prefill([[*ids, *text]]).logits
            logits = logits[:, -1]
            for process in sampling.processors():
                logits = process([ids], logits)
            p = softmax(logits)[0]
            longer |= {(*text, int(token)): weight * p[token] for token in np.flatnonzero(p)}
        found = longer
    return found


# ------------------------------------------------------------------------------------------------- caches


@st.composite
def trees(draw: st.DrawFn) -> tuple[Tree, int]:
    """A tree, and the node down to which it is accepted."""
    size = draw(st.integers(1, 7))
    parents = [-1, *(draw(st.integers(0, node - 1)) for node in range(1, size))]
    return Tree(np.array(parents)), draw(st.integers(0, size - 1))


EVICTIONS = (
    "",
    "snapkv{budget=24 sinks=2 recent=4 window=3 every=6}",
    "streaming{budget=24 rerotate=true every=6}",
)


@pytest.mark.parametrize("passes", EVICTIONS)
@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(trees(), trees()), min_size=1, max_size=12), st.integers(0, 99))
def test_whatever_is_accepted_the_cache_is_that_of_plain_decoding(
    passes: str, calls: list[tuple[tuple[Tree, int], ...]], seed: int
) -> None:
    """Slot for slot, in both rows, through evictions of each when its time has come: any rule may drive the model."""
    model, rng = verifying("llama", passes), np.random.default_rng(seed)
    prompts = [prompt(9, seed=1), prompt(9, seed=2)]
    together, alone = opened(model, prompts), [opened(model, [ids]) for ids in prompts]
    last, places = np.array([5, 6]), np.array([9, 9])
    for planned in calls:
        limit = together.allowed(np.full(2, 99))
        nodes = max(tree.nodes for tree, _ in planned)
        tokens, positions = np.zeros((2, nodes), np.int64), np.full((2, nodes), -1)
        mask, path = (
            np.zeros((2, nodes, nodes), bool) | np.eye(nodes, dtype=bool),
            np.zeros((2, nodes), np.int64),
        )
        count = np.zeros(2, np.int64)
        for row, (tree, leaf) in enumerate(planned):
            size, accepted = tree.nodes, tree.path(leaf)[: limit[row]]
            tokens[row, :size] = [last[row], *rng.integers(0, VOCABULARY, size - 1)]
            positions[row, :size], mask[row, :size, :size] = places[row] + tree.depth, tree.mask
            count[row] = len(accepted)
            path[row, : count[row]] = accepted
        together.verify(tokens, positions, mask)
        together.commit(path, count)
        for row, request in enumerate(alone):
            for node in path[row, : count[row]].tolist():
                request.step(tokens[row : row + 1, node : node + 1], places[row : row + 1, None])
                places[row] += 1
            last[row] = rng.integers(0, VOCABULARY)
            assert_same_cache(model, together, row, request)


def opened(model: LanguageModel, prompts: list[list[int]]) -> Request:
    request = model.open(len(prompts), 16)
    request.prefill(prompts)
    return request


def assert_same_cache(model: LanguageModel, together: Request, row: int, alone: Request) -> None:
    for state in model.manifest.states:
        found, wanted = (request.buffers.read(state.name) for request in (together, alone))
        found, wanted = found[row], wanted[0]
        axis = slot_axis(state.axes)
        if axis is None:
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)
            continue
        place, used = state.axes.index(axis) - 1, int(alone.buffers.occupied()[axis])
        if state.kind == "position":
            assert (found.take(range(used, found.shape[place]), place) == -1).all()
        held = [x.take(range(used), place) for x in (found, wanted)]
        np.testing.assert_allclose(*held, atol=2e-5)


# ------------------------------------------------------------------------------------------------- refusals


@dataclass(frozen=True)
class Careless:
    """A drafter whose trees do not fit."""

    made: Draft
    name: str = "careless"
    drawn: Drawn = Drawn.DETERMINISTIC
    fills: bool = False
    tops: int = 0

    def open(self, prompt: Sequence[int]) -> Careless:
        return self

    def propose(self, plan: Tree, decisions: Decisions) -> Draft:
        return self.made

    def observe(self, verified: Verified) -> None:
        """It learns nothing."""


def careless(parents: list[int], tokens: list[int]) -> Careless:
    return Careless(Draft(Tree(np.array(parents)), np.array(tokens), Drawn.DETERMINISTIC))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drafter": "guesses"}, "is no drafter; choose from suffix, prompt_lookup"),
        ({"drafter": 5}, "drafter"),
        ({"drafter": "suffix", "accept": "all"}, "is no rule that has a name; choose from same_text"),
        ({"drafter": "suffix", "accept": 5}, "accept"),
        ({"accept": "chain"}, "give a drafter, or leave it out"),
        ({"nodes": 4}, "give a drafter, or leave nodes out"),
        ({"drafter": "suffix", "nodes": 65}, "nodes"),
        ({"drafter": "lookahead", "accept": "k_seq"}, "take a drafter that draws, suffix for example"),
        (
            {"drafter": "suffix", "accept": "greedy", "sampling": OPTIONS[1]},
            "temperature is 0.7; set it to 0",
        ),
        ({"drafter": careless([-1, 0], [96, 96])}, "proposed 2 nodes from token 96 on"),
        ({"drafter": careless([-1, 0], [0, VOCABULARY])}, "at most 8 below 97 fit"),
        ({"drafter": careless([-1] + 8 * [0], [0] * 9)}, "proposed 9 nodes"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"nodes": 8 if "drafter" in options else None, **options}
    with pytest.raises(InputError, match=said):
        verifying("llama").generate(PROMPTS[0], **given)


def test_other_models_say_what_to_type() -> None:
    with pytest.raises(InputError, match=r"tokopt optimize MODEL verify -o verifying\.tokopt"):
        artifact("llama").generate(PROMPTS[0], drafter="suffix")
    with pytest.raises(InputError, match="drafts by itself; leave the drafter out"):
        artifact("llama", "speculate").generate(PROMPTS[0], drafter="suffix")
    request = artifact("llama").open(1, 16)
    with pytest.raises(InputError, match="make it with the pass verify"):
        request.verify(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64), np.ones((1, 1, 1), bool))


@pytest.mark.parametrize(
    ("path", "count", "said"),
    [
        (
            np.zeros((1, 2), np.int64),
            np.ones(1, np.int64),
            r"give int64\[1, 3\] and int64\[1\], once after verify",
        ),
        (np.zeros((1, 3), np.int64), np.ones(1), "count float64"),
        (np.full((1, 3), 3), np.ones(1, np.int64), "path has nodes from 3 to 3"),
        (np.zeros((1, 3), np.int64), np.array([4]), r"count \[4\] of them; of 3 nodes rows may keep \[3\]"),
    ],
)
def test_what_is_no_path_of_the_tree_is_refused(path: np.ndarray, count: np.ndarray, said: str) -> None:
    request = opened(verifying("llama"), [prompt(5)])
    request.verify(np.zeros((1, 3), np.int64), np.array([[5, 6, 6]]), Tree(np.array([-1, 0, 0])).mask[None])
    with pytest.raises(InputError, match=said):
        request.commit(path, count)
    request.commit(np.zeros((1, 3), np.int64), np.ones(1, np.int64))
    with pytest.raises(InputError, match="once after verify"):
        request.commit(np.zeros((1, 3), np.int64), np.ones(1, np.int64))


@pytest.mark.parametrize(
    "passes", ["verify,speculate", "verify,h2o{budget=48}", "verify,verify", "verify,sample"]
)
def test_it_comes_last(passes: str) -> None:
    with pytest.raises(PassError, match="put it before verify"):
        tokopt.optimize(bundle("llama"), passes)


@pytest.mark.parametrize(("drafter", "rule"), [*product(DRAFTERS, RULES)])
def test_every_pair_with_a_name_runs_or_is_refused(drafter: str, rule: str) -> None:
    """What is refused is a rule that weighs drafts, with a drafter that draws none."""
    model, weighs = verifying("llama"), read_rule(rule).reads_q
    if weighs and drafter != "suffix":
        with pytest.raises(InputError, match="take a drafter that draws"):
            model.generate(PROMPTS[1], drafter=drafter, accept=rule)
    else:
        assert len(model.generate(PROMPTS[1], max_tokens=4, drafter=drafter, accept=rule).tokens) == 4


def table() -> str:
    """The table of docs/speculation.md: what every pair of a drafter and a rule is."""
    lines = [f"| rule | {' | '.join(f'`{name}`' for name in DRAFTERS)} |", f"|---|{'---|' * len(DRAFTERS)}"]
    for name in RULES:
        rule, cells = read_rule(name), list[str]()
        for host in DRAFTERS:
            drawn = make_drafter(host, VOCABULARY, rule).drawn
            kept = "lossless" if lossless(rule, drawn).holds else "lossy"
            refused = rule.reads_q and drawn is Drawn.DETERMINISTIC
            inside = ", graph" * (name in get_args(get_type_hints(Speculate)["accept"]) and host in IN_GRAPH)
            cells.append("-" if refused else f"{kept}{inside}")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_page_says_what_every_pair_is() -> None:
    assert f"\n{table()}\n" in (ROOT / "docs" / "speculation.md").read_text()
