"""Eviction of keys and values: every policy keeps what its formula says, and nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import tokopt
from tests.matrix.eviction import ALPHA, LENGTH, SCORES, WRAPPERS, NaiveDecoder
from tests.matrix.language import artifact, bundle, model, prompt
from tests.zoo.decoders import CONTEXT, DECODERS
from tokopt.errors import InputError, PassRefused, TokoptError
from tokopt.ir.bundle import Bundle
from tokopt.ir.calls import initial
from tokopt.passes import PASSES, load_pass
from tokopt.passes.kv.adakv import AdaKV
from tokopt.passes.kv.base import Cached, KVEviction
from tokopt.passes.kv.knorm import KNorm

METHODS = (
    *(name for name in PASSES if issubclass(load_pass(name), KVEviction) and name not in WRAPPERS),
    "streaming rerotate=true",
    "chunk h2o",
    "adakv snapkv",
    "chunk adakv keydiff",
)
ROTARY_ONLY = ("expected_attention", "streaming rerotate=true")
LEARNED = ("gpt2", "opt", "hand_written")
"""Decoders without rotary embeddings."""

TYPICAL = ("llama", "gemma3")
"""Grouped heads; sliding layers beside full ones: every method runs on these, and on one of two more in turn."""

TURNS = ("mistral", "gpt2")
"""Sliding layers only; learned positions. A method sees neither: windows and positions are the base class's."""

PAIRS = [(m, name) for i, m in enumerate(METHODS) for name in (*TYPICAL, TURNS[i % 2])]
PAIRS = [(m, name) for m, name in PAIRS if m not in ROTARY_ONLY or name not in LEARNED]
PAIRS += [("h2o", name) for name in DECODERS if ("h2o", name) not in PAIRS]
FORMULAS = [*(m for m in METHODS if m != "random_kv"), "snapkv kernel=7 pooling=max"]

BY_SLOT = ("random_kv", "keyformer")
"""Methods whose hashes see slot numbers, which padding moves."""

BUDGET, SINKS, RECENT, EVERY = 12, 2, 4, 3
OPTIONS = f"budget={BUDGET} sinks={SINKS} recent={RECENT} every={EVERY}"


OWN = {
    "snapkv": " window=3",
    "expected_attention": " future=8",
    "chunk": f" length={LENGTH}",
    "adakv": f" alpha={ALPHA}",
}


def spelled(method: str, options: str = OPTIONS) -> str:
    name, _, extra = method.partition(" ")
    if name in WRAPPERS:
        return f"{name}{{press={spelled(extra, options)}{OWN[name]}}}"
    return f"{name}{{{options}{OWN.get(name, '')}{' ' + extra if extra else ''}}}"


def naive_decoder(method: str) -> tuple[str, NaiveDecoder]:
    """The model that a method is tried on, and its naive decoder."""
    name = "hand_rotary" if method in ROTARY_ONLY else "hand_written"
    rerotate = "rerotate" in method
    wrappers = tuple(word for word in method.split() if word in WRAPPERS)
    spelling = " ".join(method.split()[len(wrappers) :])
    given: Any = model(name)
    return name, NaiveDecoder(
        given,
        spelling if spelling in SCORES else spelling.split()[0],
        BUDGET,
        SINKS,
        RECENT,
        EVERY,
        rerotate,
        EVERY if rerotate else 10**9,
        wrappers,
    )


@cache
def evicting(name: str, pipeline: str) -> Bundle:
    return tokopt.optimize(bundle(name), pipeline)


class Driver:
    """The host's part in plain torch: holds state, feeds it back, compacts when told."""

    def __init__(self, made: Bundle, batch: int, capacity: int = 64) -> None:
        self.bundle = made
        self.state = {state.name: initial(state, batch, capacity) for state in made.states}
        self.batch = batch

    def run(self, program: str, **feed: Tensor) -> dict[str, Tensor]:
        made = self.bundle.programs[program]
        known = {"due": torch.ones(self.batch, dtype=torch.bool), **feed}
        values = made(*(self.state[i.state] if i.state else known[i.name] for i in made.inputs))
        self.state.update({o.state: x for o, x in zip(made.outputs, values, strict=True) if o.state})
        return {o.name: x for o, x in zip(made.outputs, values, strict=True)}

    def step(self, tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        """Logits [batch, vocabulary] of the last token."""
        count = len(tokens[0])
        causal = torch.ones(count, count, dtype=torch.bool).tril().repeat(len(tokens), 1, 1)
        got = self.run(
            "step",
            tokens=torch.tensor(tokens),
            positions=torch.tensor(positions),
            mask=causal,
            rows=torch.tensor([-1]),
        )
        return got["logits"][:, 0]

    def read(self, prompts: list[list[int]]) -> Tensor:
        """Prompts of unequal length, padded on the left."""
        longest = max(map(len, prompts))
        missing = [longest - len(ids) for ids in prompts]
        tokens = [[0] * pad + ids for pad, ids in zip(missing, prompts, strict=True)]
        return self.step(tokens, [[-1] * pad + list(range(longest - pad)) for pad in missing])

    def held(self, kind: str, layer: int, head: int) -> Tensor:
        """What a head of the first row holds of a kind [tokens, channels], oldest first."""
        return self.state[f"{kind}_{layer}"][0, head, self._positions(layer, head) >= 0]

    def held_positions(self, layer: int, head: int = 0) -> Tensor:
        """The positions of what a head of the first row holds [tokens], oldest first."""
        positions = self._positions(layer, head)
        return positions[positions >= 0]

    def _positions(self, layer: int, head: int) -> Tensor:
        by_layer = {s.layer: self.state[s.name] for s in self.bundle.states if s.kind == "position"}
        positions = by_layer[layer if layer in by_layer else None][0, ..., 0]
        return positions[head if len(positions) > 1 else 0]

    def follow(self, prompts: list[list[int]], texts: list[list[int]], every: int) -> Tensor:
        """Logits [tokens, batch, vocabulary] of texts after prompts, compacting as the runtime does."""
        logits = [self.read(prompts)]
        self.run("compact")
        for i in range(len(texts[0])):
            positions = [[len(ids) + i] for ids in prompts]
            logits.append(self.step([[text[i]] for text in texts], positions))
            if (i + 1) % every == 0:
                self.run("compact")
        return torch.stack(logits)


@pytest.mark.parametrize("method", FORMULAS)
def test_generates_what_the_formula_generates(method: str) -> None:
    """Out of ONNX Runtime, token for token, through many evictions, with each method's own choice of heads."""
    name, naive = naive_decoder(method)
    made = artifact(name, spelled(method))
    for seed in range(3):
        ids = prompt(20, seed)
        assert list(made.generate(ids, max_tokens=40).tokens) == naive.generate(ids, 40)
    full = artifact(name).generate(ids, max_tokens=40).tokens
    assert list(full) != naive.generate(ids, 40)  # so that the comparison means something


@pytest.mark.parametrize("method", FORMULAS)
def test_keeps_what_the_formula_keeps(method: str) -> None:
    """The keys in the cache, matched to the naive decoder's by value, after every eviction of a decode."""
    ids = prompt(20)
    name, naive = naive_decoder(method)
    naive.chunk = 10**9
    for count in (1, 1 + EVERY, 1 + 4 * EVERY):  # the last token is not read
        text = naive.generate(ids, count)[: count - 1]
        driver = Driver(evicting(name, spelled(method)), 1)
        driver.follow([ids], [text], EVERY)
        for layer, heads in enumerate(naive.heads):
            for h, head in enumerate(heads):
                wanted = np.array([entry.key for entry in head.entries])
                np.testing.assert_allclose(driver.held("key", layer, h).numpy(), wanted, atol=1e-4)
        longest = [max(len(head.entries) for head in heads) for heads in naive.heads]
        assert driver.state["length"][0].tolist() == (longest if "adakv" in method else BUDGET)


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_a_budget_that_holds_all_changes_nothing(method: str, name: str) -> None:
    """Token for token the logits of the full cache, although ``compact`` ran."""
    ids, text = prompt(20), prompt(8, seed=1)
    made = evicting(name, spelled(method))
    roomy = Driver(made, 1)
    roomy.state["budget"].fill_(99)
    full = Driver(bundle(name), 1)
    wanted = [full.read([ids])] + [full.step([[t]], [[20 + i]]) for i, t in enumerate(text)]
    torch.testing.assert_close(roomy.follow([ids], [text], EVERY), torch.stack(wanted), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("method", "name"), [pair for pair in PAIRS if pair[0] not in BY_SLOT])
def test_padding_is_never_counted_or_kept(method: str, name: str) -> None:
    """A row beside a longer one, padded on the left, goes as it goes alone; budgets are those of the real tokens."""
    prompts, texts = [prompt(15), prompt(26, seed=2)], [prompt(7, seed=1), prompt(7, seed=3)]
    made = evicting(name, spelled(method))
    together = Driver(made, 2)
    logits = together.follow(prompts, texts, EVERY)
    for row in range(2):
        alone = Driver(made, 1).follow([prompts[row]], [texts[row]], EVERY)
        torch.testing.assert_close(logits[:, row], alone[:, 0], atol=2e-4, rtol=1e-4)
    if "adakv" not in method:
        assert (
            together.state["length"].tolist() == [BUDGET + 1] * 2
        )  # seven tokens: one since the last eviction


@pytest.mark.parametrize("method", METHODS)
def test_sinks_and_recent_tokens_survive(method: str) -> None:
    ids = prompt(30)
    made = evicting("llama", spelled(method))
    driver = Driver(made, 1)
    driver.read([ids])
    before = driver.state["value_0"][0].clone()
    driver.run("compact")
    for head in range(len(before)):
        after = driver.held("value", 0, head)
        assert torch.equal(after[:SINKS], before[head, :SINKS])
        assert torch.equal(after[-RECENT:], before[head, 30 - RECENT : 30])


@pytest.mark.parametrize(
    ("wrapped", "press"),
    [
        ("chunk{press=h2o{OPTIONS} length=999}", "h2o{OPTIONS}"),
        ("adakv{press=h2o{OPTIONS} alpha=1.0}", "h2o{OPTIONS}"),
        ("adakv{press=knorm{OPTIONS recent=0.5} alpha=1.0}", "knorm{OPTIONS recent=0.5}"),
        (
            "chunk{press=knorm{OPTIONS recent=4 heads=false} length=999}",
            "knorm{OPTIONS recent=4 heads=false}",
        ),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_limit_of_a_wrapper_is_what_it_wraps(wrapped: str, press: str, name: str) -> None:
    """One chunk that holds the text; heads that are sure of all that they would have alone."""
    ids, text = prompt(24), prompt(8, seed=1)
    logits = [
        Driver(evicting(name, made.replace("OPTIONS", "budget=12 sinks=2 every=3")), 1).follow(
            [ids], [text], 3
        )
        for made in (wrapped, press)
    ]
    torch.testing.assert_close(*logits, atol=1e-6, rtol=1e-6)


def test_heads_share_the_budget_of_their_layer() -> None:
    """Different numbers of tokens, as many together as with budgets of their own, and none less than its share."""
    driver = Driver(evicting("llama", "adakv{press=knorm{budget=12 sinks=0 recent=0} alpha=0.5}"), 1)
    driver.read([prompt(40)])
    driver.run("compact")
    counts = [[len(driver.held("key", layer, head)) for head in range(2)] for layer in range(2)]
    assert all(sum(layer) == 2 * 12 and min(layer) >= 6 for layer in counts)
    assert driver.state["length"][0].tolist() == [max(layer) for layer in counts]
    assert len(set(counts[0])) > 1


def test_every_chunk_keeps_the_same_fraction() -> None:
    """Half of ten tokens, and of the four of the last chunk; after more text, what the budget is of all of it."""
    driver = Driver(evicting("llama", "chunk{press=tova{budget=17 every=3} length=10}"), 1)
    driver.read([prompt(34)])
    driver.run("compact")
    positions = driver.held_positions(0)
    assert torch.bincount(positions // 10).tolist() == [5, 5, 5, 2]
    for i in range(34):
        driver.step([[i]], [[34 + i]])
    driver.run("compact")
    positions = driver.held_positions(0)
    counts = torch.bincount(positions // 10).tolist()
    assert sum(counts) == 17 and set(counts[:6]) <= {2, 3} and counts[6] == 2


@pytest.mark.parametrize("recent", [5, 0.5])
def test_chunks_give_way_to_what_is_always_kept_and_to_windows(recent: float) -> None:
    """All newest tokens, though they are more than their chunks' part; of the others, none that the window has left."""
    driver = Driver(
        evicting("mistral", f"chunk{{press=knorm{{budget=10 sinks=0 recent={recent}}} length=5}}"), 1
    )
    driver.read([prompt(30)])
    driver.run("compact")
    for head in range(2):
        assert set(range(25, 30)) <= set(driver.held_positions(0, head).tolist())
        assert set(range(23, 30)) <= set(driver.held_positions(0, head).tolist())  # a window of 7


@dataclass(frozen=True)
class Gathering(KNorm):
    """Adds what it evicts to the newest token that stays."""

    name: ClassVar[str] = "gathering"

    def merge(self, cached: Cached, kept: Tensor) -> tuple[Tensor, Tensor]:
        evicted = (cached.used & ~kept)[..., None]
        newest = (cached.used & (cached.newer == 0))[..., None]
        sums = [(x * evicted).sum(2, keepdim=True) * newest for x in (cached.keys, cached.values)]
        return cached.keys + sums[0], cached.values + sums[1]


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_evicted_may_be_merged_into_what_is_kept(wrapped: bool, tmp_path: Path) -> None:
    """Sums over all slots stay what they were, also inside a wrapper; a row that is not due stays as it is."""
    press = Gathering(budget=BUDGET, sinks=SINKS, recent=RECENT, every=EVERY)
    made = tokopt.optimize(bundle("llama"), [AdaKV(press) if wrapped else press])
    driver = Driver(made, 2)
    driver.read([prompt(20), prompt(20, seed=1)])
    before = {
        (kind, layer): driver.state[f"{kind}_{layer}"][..., :20, :].clone()
        for kind, layer in (("key", 0), ("value", 1))
    }
    driver.run("compact", due=torch.tensor([True, False]))
    for (kind, layer), tensor in before.items():
        for head in range(2):
            held = driver.held(kind, layer, head)
            assert len(held) < 20
            torch.testing.assert_close(held.sum(0), tensor[0, head].sum(0), atol=1e-5, rtol=1e-5)
        assert torch.equal(driver.state[f"{kind}_{layer}"][1, :, :20], tensor[1])
    tokopt.export(made, tmp_path / "merging")  # ONNX Runtime computes the same


def test_renumbered_text_outgrows_the_context() -> None:
    """A prompt and a text longer than the positions that the model was trained on, beside a shorter one."""
    name, naive = naive_decoder("streaming rerotate=true")
    made = artifact(name, spelled("streaming rerotate=true"))
    prompts = [prompt(CONTEXT + 30), prompt(25, seed=1)]
    texts = made.generate(prompts, max_tokens=CONTEXT)
    assert [len(text.tokens) for text in texts] == [CONTEXT, CONTEXT]
    assert list(texts[0].tokens) == naive.generate(prompts[0], CONTEXT)
    with pytest.raises(InputError, match="context holds"):
        artifact(name, spelled("streaming")).generate(prompts[0])


@pytest.mark.parametrize(
    ("method", "name"),
    [(method, name) for method in ROTARY_ONLY for name in LEARNED],
)
def test_learned_positions_cannot_be_rotated(method: str, name: str) -> None:
    with pytest.raises(PassRefused, match=r"keys of layer 0 are not rotated by their positions \(RoPE\)"):
        tokopt.optimize(bundle(name), spelled(method), strict=True)


def test_recent_tokens_as_a_share_of_the_budget() -> None:
    """Half of twelve is six, and half of a fraction of the prompt is what that fraction becomes."""
    ids, text = prompt(24), prompt(8, seed=1)
    for share, number in (
        ("budget=12 recent=0.5", "budget=12 recent=6"),
        ("budget=0.5 recent=0.25", "budget=12 recent=3"),
    ):
        logits = [
            Driver(evicting("llama", f"h2o{{{options} sinks=2 every=3}}"), 1).follow([ids], [text], 3)
            for options in (share, number)
        ]
        assert torch.equal(*logits)


def test_budgets_by_layer() -> None:
    """A list, a pyramid, and a fraction of the prompt's real tokens."""
    cases = {
        "knorm{budget=[20,13] recent=4}": [[20, 13]] * 2,
        "knorm{budget=16 schedule=pyramid recent=4}": [[24, 9]] * 2,  # 8 would be the protected tokens alone
        "knorm{budget=0.5 recent=4}": [13, 20],
    }
    for text, lengths in cases.items():
        driver = Driver(evicting("llama", text), 2)
        driver.read([prompt(25), prompt(40)])
        driver.run("compact")
        assert driver.state["length"].tolist() == lengths


def test_memory_is_what_the_budget_says() -> None:
    """Bytes allocated: the budget and the tokens until the next eviction, in every state with slots."""
    got = artifact("llama", spelled("h2o")).generate(prompt(100), max_tokens=50)
    slots = BUDGET + EVERY
    assert got.statistics.cache_slots == slots
    per_slot = 2 * (2 * 2 * 16 * 4 + 2 * 4) + 8  # two layers of keys, values and masses; positions
    assert got.statistics.cache_bytes == slots * per_slot + 8 + 8  # one length, one budget


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    {
        "knorm{budget=36}": "budget above the 4 sinks and 32 recent tokens .* found 36",
        "h2o{budget=50 recent=1.0}": "recent=1.0 must be a number of tokens, or a share below 1",
        "h2o": "h2o needs a budget",
        "h2o{budget=[50,50,50]}": "lists 3 layers, the model has 2",
        "h2o{budget=50},knorm{budget=40}": "evicted already",
        "h2o{budget=1.5}": "a number of slots, or a fraction",
        "h2o{budget=50 every=-1}": "must not be negative",
        "h2o{budget=[50,40] schedule=pyramid}": "a list of budgets has its own schedule",
        "snapkv{budget=50 window=40}": "window=40 must be in 1 to recent=32",
        "snapkv{budget=50 kernel=4}": "kernel=4 must be odd",
        "snapkv{budget=50 pooling=sum}": "pooling",
        "expected_attention{budget=50 future=0}": "future=0 must be positive",
        "streaming{budget=50 rerotate=true schedule=pyramid}": "give all one budget",
        "adakv{press=h2o{budget=50} alpha=2.0}": "alpha=2.0 must be in 0 to 1",
        "adakv{press=tova{budget=50}}": "all heads of tova{budget=50} keep the same tokens; give it heads=true",
        "adakv{press=h2o{budget=50} budget=9}": "pass adakv has no option 'budget'.* its options: press, alpha",
        "chunk{press=h2o{budget=50} length=0}": "length=0 must be positive",
        "chunk{press=tome{r=1}}": "press=tome{r=1} is of the wrong type; it takes KVEviction",
        "chunk{press=streaming{budget=50 rerotate=true}}": "give a press that keeps positions",
        "tome{r=1}": "tome works on encoders",
    }.items(),
)
def test_what_cannot_be_is_refused(pipeline: str, reason: str) -> None:
    with pytest.raises(TokoptError, match=reason) as caught:
        tokopt.optimize(bundle("llama"), pipeline)
    assert "\n" not in str(caught.value)


def test_a_budget_of_everything_is_the_same_bundle() -> None:
    for pipeline in ("h2o{budget=1.0}", "adakv{press=chunk{press=h2o{budget=1.0}}}"):
        same = tokopt.optimize(bundle("llama"), pipeline)
        assert same.programs == bundle("llama").programs
