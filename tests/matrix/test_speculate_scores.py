"""What an eviction remembers of attention after a tree was verified is what it remembers of the committed tokens alone.

In plain torch, call by call and slot for slot: of every method with a memory, beside a driver that reads the committed
tokens one by one.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import tokopt
from tests.matrix.language import bundle, prompt
from tests.matrix.test_eviction import Driver
from tests.matrix.test_kivi import TEXT as KIVI
from tests.zoo.decoders import CONTEXT, VOCABULARY
from tokopt.errors import TokoptError
from tokopt.ir.bundle import Bundle
from tokopt.ir.format import State, find_role, slot_axis
from tokopt.passes import PASSES, load_pass
from tokopt.passes.kv.base import KVEviction
from tokopt.passes.kv.wrapper import Wrapper
from tokopt.pipeline.base import Pass
from tokopt.rewrite.cache import ProgramEdit
from tokopt.rewrite.edit import call, open_graph
from tokopt.runtime import Sampling
from tokopt.runtime.speculation.tree import Tree

OPTIONS = "budget=14 sinks=2 recent=4 every=5"

OWN = {"snapkv": " window=3", "expected_attention": " future=8"}


def remembers(kind: type[Pass]) -> bool:
    """Whether an eviction keeps something of what attention sees, by itself."""
    return (
        issubclass(kind, KVEviction)
        and not issubclass(kind, Wrapper)
        and kind.observe is not KVEviction.observe
    )


METHODS = tuple(name for name in PASSES if remembers(load_pass(name)))
"""Evictions that remember what attention sees."""

PIPELINES = {
    **{name: f"{name}{{{OPTIONS}{OWN.get(name, '')}}}" for name in METHODS},
    "adakv": f"adakv{{press=tova{{{OPTIONS} heads=true}}}}",
    "kivi": f"h2o{{{OPTIONS}}},{KIVI}",
}
"""With lengths per layer, and with a cache that is expanded before it is read."""

DRAFTERS = {"tova": "prompt_lookup", "h2o": "logitspec"}
"""A chain, and a tree with branches at its root alone; the others have trees of any shape."""

DECODER = "hand_rotary"

PROMPTS = [prompt(9, seed=1), prompt(9, seed=2)]


DRAWING = {role: torch.tensor(value) for role, value in Sampling().drawing(2).items()}


@cache
def made(pipeline: str) -> Bundle:
    return tokopt.optimize(bundle(DECODER), pipeline, strict=True)


class Text(Driver):
    """A driver that also verifies, commits and speculates; programs are called by their roles."""

    def call(self, program: str, **roles: Tensor) -> dict[str, Tensor]:
        inputs = self.bundle.programs[program].inputs
        given = {spec.name: roles[spec.role] for spec in inputs if spec.role in roles}
        given |= {
            link.target.name: self.handed[link.source.name]
            for link in self.bundle.links
            if link.target.program == program
        }
        self.handed = self.run(program, **given)
        return self.handed

    def after(self, prompts: list[list[int]]) -> Text:
        """Read prompts of one length, and have the first eviction run."""
        count = len(prompts[0])
        tokens = torch.tensor(prompts)
        self.call(
            "step",
            tokens=tokens,
            positions=torch.arange(count).expand_as(tokens),
            mask=torch.ones(count, count, dtype=torch.bool).tril().expand(len(prompts), -1, -1),
            rows=torch.tensor([-1]),
            limit=torch.zeros(len(prompts), dtype=torch.int64),
            **DRAWING,
        )
        self.run("compact")
        return self


def opened(pipeline: str, prompts: list[list[int]]) -> Text:
    return Text(made(pipeline), len(prompts)).after(prompts)


def assert_alike(found: Text, row: int, wanted: Text, rtol: float) -> int:
    """Every state of ``wanted``, which has one row, is that row of ``found``; how many of them are memories."""
    memories = 0
    for state in wanted.bundle.states:
        one, other = found.state[state.name][row], wanted.state[state.name][0]
        axis = slot_axis(state.axes)
        if state.dtype == "uint8" or state.kind in ("scale", "zero"):
            continue  # groups of kivi reach into free slots; what was packed before is as it was
        if axis is not None and state.kind not in ("position", "score"):  # free slots may hold anything
            assert state.occupancy is not None
            length = wanted.state[state.occupancy.state][0]
            used = int(length if state.occupancy.column is None else length[state.occupancy.column])
            place = state.axes.index(axis) - 1
            one, other = one.narrow(place, 0, used), other.narrow(place, 0, used)
        memories += state.kind in ("score", "memory")
        torch.testing.assert_close(
            one, other, rtol=rtol, atol=2e-5, msg=f"{state.name}: {one} is not {other}"
        )
    return memories


@pytest.mark.parametrize("name", PIPELINES)
def test_commit_leaves_the_memory_of_the_path(name: str) -> None:
    """Of any tree and any path: rows accept different numbers of nodes, none of one that has ended."""
    rng, pipeline = np.random.default_rng(0), PIPELINES[name]
    together = opened(f"{pipeline},verify", PROMPTS)
    alone = [opened(pipeline, [ids]) for ids in PROMPTS]
    places = [len(ids) for ids in PROMPTS]
    commit = together.bundle.schedule.commit
    assert commit is not None
    for turn in range(4):
        trees = [random_tree(rng, 6) for _ in PROMPTS]
        paths = [tree.path(int(rng.integers(0, 6)))[:5] for tree in trees]
        paths[0] = () if turn == 2 else paths[0]
        tokens = rng.integers(0, VOCABULARY, (2, 6))
        depth = np.array([tree.depth for tree in trees])
        positions = np.where([[bool(path)] for path in paths], np.array(places)[:, None] + depth, -1)
        together.call(
            "step",
            tokens=torch.tensor(tokens),
            positions=torch.tensor(positions),
            mask=torch.tensor(np.array([tree.mask for tree in trees])),
            rows=torch.arange(6),
        )
        path = torch.tensor([[*nodes, *[0] * (6 - len(nodes))] for nodes in paths])
        together.call(commit, path=path, count=torch.tensor([len(nodes) for nodes in paths]))
        for row, (driver, nodes) in enumerate(zip(alone, paths, strict=True)):
            for node in nodes:
                driver.step([[int(tokens[row, node])]], [[places[row]]])
                places[row] += 1
            assert assert_alike(together, row, driver, 1e-4) >= 2
        if turn == 1:
            for driver in (together, *alone):
                driver.run("compact")


def random_tree(rng: np.random.Generator, nodes: int) -> Tree:
    return Tree(np.array([-1, *(int(rng.integers(max(node - 3, 0), node)) for node in range(1, nodes))]))


@pytest.mark.parametrize("name", [*METHODS, "adakv"])
def test_a_program_that_speculates_remembers_what_it_commits(name: str) -> None:
    """Of trees and of chains, and of a row that has ended; the second time it writes what it wrote, it proposes it."""
    pipeline, drafter = PIPELINES[name], DRAFTERS.get(name, "token_recycling")
    together = opened(f"{pipeline},speculate{{drafter={drafter} nodes=6}}", PROMPTS)
    alone = [opened(pipeline, [ids]) for ids in PROMPTS]
    *_, entry = together.bundle.schedule.of_role("decode")
    last, places, committed = [5, 6], [len(ids) for ids in PROMPTS], list[int]()
    for turn in range(14):
        limit = torch.tensor([0 if turn == 3 else 4, 3])
        given = together.call(
            entry.program,
            tokens=torch.tensor(last)[:, None],
            positions=torch.where(limit > 0, torch.tensor(places), -1)[:, None],
            parent=torch.tensor(entry.tree),
            limit=limit,
            **DRAWING,
        )
        outputs = together.bundle.programs[entry.program].outputs
        tokens, count = (given[find_role(outputs, role).name] for role in ("tokens", "count"))  # type: ignore[union-attr]
        committed += count.tolist()
        for row, driver in enumerate(alone):
            for token in tokens[row, : count[row]].tolist():
                logits = driver.step([[last[row]]], [[places[row]]])
                assert int(logits[0].argmax()) == token
                last[row], places[row] = token, places[row] + 1
            assert_alike(together, row, driver, 1e-4)
        if turn % 3 == 2:
            for driver in (together, *alone):
                driver.run("compact")
    assert max(committed) > 1 and 0 in committed


@pytest.mark.parametrize("drafter", ["prompt_lookup", "token_recycling"])
def test_no_node_stands_beyond_the_table_of_positions(drafter: str) -> None:
    """From every place near the end, whatever a host allows, the root's token is the model's own.

    PyTorch raises IndexError for a row that an embedding does not have.
    """
    speculating = tokopt.optimize(bundle("hand_written"), f"speculate{{drafter={drafter} nodes=6}}")
    *_, entry = speculating.schedule.of_role("decode")
    for position in range(CONTEXT - 7, CONTEXT):
        driver, plain = Text(speculating, 2), Text(bundle("hand_written"), 2)
        given = driver.call(
            entry.program,
            tokens=torch.tensor([[5], [5]]),
            positions=torch.full((2, 1), position),
            parent=torch.tensor(entry.tree),
            limit=torch.tensor([2**40, 1]),
            **DRAWING,
        )
        outputs = speculating.programs[entry.program].outputs
        tokens, count = (given[find_role(outputs, role).name] for role in ("tokens", "count"))  # type: ignore[union-attr]
        wanted = plain.step([[5], [5]], [[position]] * 2).argmax(-1)
        assert torch.equal(tokens[:, 0], wanted)
        assert 1 <= int(count[0]) <= CONTEXT - position and int(count[1]) == 1


@pytest.mark.parametrize("passes", ["verify", "speculate{drafter=prompt_lookup}"])
def test_what_is_made_of_the_tokens_is_refused(passes: str) -> None:
    """What follows from the tokens, and not from what attention sees, would need the model once more."""
    given = bundle(DECODER)
    edit = ProgramEdit(given, "step", open_graph(given.programs["step"]))
    state = State("seen", "memory", "int64", ("batch",))
    seen = edit.take(state, torch.zeros(edit.example[0].shape[0], dtype=torch.int64))
    with edit.module.graph.inserting_before(edit.module.graph.output_node()):
        after = call(edit.module.graph, summed, seen, edit.of_role("tokens"), like=edit.results[0])
    edit.give(state, after)
    counting = replace(given.with_program("step", edit.finish()), states=(*given.states, state))
    with pytest.raises(TokoptError, match="state 'seen' is made of more than attention sees"):
        tokopt.optimize(counting, passes, strict=True)


def summed(seen: Tensor, tokens: Tensor) -> Tensor:
    return seen + tokens.sum(1)
