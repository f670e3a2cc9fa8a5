"""Speculation that the host drives: draft, have the model verify, accept by a rule, commit, take note."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokopt.errors import InputError
from tokopt.runtime.sampling import Logits, Streams, softmax
from tokopt.runtime.speculation.calls import Trees
from tokopt.runtime.speculation.decisions import Floats, Uniforms
from tokopt.runtime.speculation.draft import Draft, Drawn, Rows
from tokopt.runtime.speculation.drafters.base import Drafter, TextDrafter, Verified
from tokopt.runtime.speculation.lossless import Lossless, lossless
from tokopt.runtime.speculation.planner.shapes import Shapes
from tokopt.runtime.speculation.rules.base import Accepted, Rule
from tokopt.runtime.speculation.rules.greedy import Greedy
from tokopt.runtime.speculation.rules.lantern import Lantern
from tokopt.runtime.speculation.tree import Tree

Process = Callable[[Sequence[Sequence[int]], Logits, NDArray[np.bool_]], Logits]
"""Logits [batch, vocabulary] to draw from, given every row's text, the model's logits, and which rows count."""

PADDING = -1
"""Position of padding."""


class Verifying(Protocol):
    """What is asked of a request, a :class:`tokopt.runtime.loop.Request`."""

    @property
    def neighbours(self) -> np.ndarray | None: ...
    def verify(self, tokens: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> np.ndarray: ...
    def commit(self, path: np.ndarray, count: np.ndarray) -> None: ...


@dataclass(frozen=True)
class Method:
    """A drafter and a rule, and what is known of them with a model, from one text to the next."""

    drafter: Drafter
    rule: Rule
    trees: Trees
    shapes: Shapes

    @property
    def lossless(self) -> Lossless:
        """Whether texts follow the model's own distribution."""
        return lossless(self.rule, self.drafter.drawn)


def check_pair(drafter: Drafter, rule: Rule, temperature: float) -> None:
    """Raise InputError for a rule that cannot verify what a drafter proposes, or that draws no tokens where it must."""
    if rule.reads_q and drafter.drawn is Drawn.DETERMINISTIC:
        raise InputError(
            f"the rule '{rule.name}' weighs drafts by the probability that they were drawn with, and the drafter "
            f"'{drafter.name}' draws none; take a drafter that draws, suffix for example, or another rule"
        )
    if isinstance(rule, Greedy) and temperature:
        raise InputError(
            f"the rule 'greedy' takes the likeliest token and the temperature is {temperature:g}; set it to 0, or take "
            "another rule"
        )


@dataclass(frozen=True)
class Step:
    """What a call committed: the tokens of each row and the logits [tokens, vocabulary] before them; its nodes."""

    rows: Sequence[tuple[list[int], np.ndarray]]
    nodes: int


class HostSpeculation:
    """The texts of one generation: their drafters, and the random numbers that they have used."""

    def __init__(self, method: Method, temperature: float, streams: Streams, vocabulary: int) -> None:
        """``streams`` are the numbers that plain sampling takes, a row's first for its first token."""
        self.method, self.temperature, self.streams = method, temperature, streams
        self.vocabulary, self.drafting = vocabulary, 0.0
        self._texts: list[TextDrafter] = []
        self._decided: list[int] = []
        self._drafted: list[int] = []

    def begin(self, prompts: Sequence[Sequence[int]], tokens: Sequence[int], logits: Logits) -> None:
        """The texts after the prompt's call: what it read and drew, and from which logits [batch, vocabulary]."""
        begun = time.perf_counter()
        self._decided, self._drafted = [1] * len(prompts), [0] * len(prompts)
        for row, (prompt, token) in enumerate(zip(prompts, tokens, strict=True)):
            text = self.method.drafter.open(prompt)
            accepted = Accepted(np.zeros(1, np.int64), np.array([token]))
            text.observe(Verified(self._root(prompt[-1]), accepted, self._top(logits[row : row + 1])))
            self._texts.append(text)
        self.drafting += time.perf_counter() - begun

    def step(
        self, request: Verifying, texts: Sequence[Sequence[int]], limit: np.ndarray, process: Process
    ) -> Step:
        """One call, in which every row commits at most ``limit`` [batch] tokens (0: it has ended)."""
        begun = time.perf_counter()
        asked = self.method.trees.next(limit)
        drafts = [self._draft(row, text, int(limit[row]), asked) for row, text in enumerate(texts)]
        drafted = time.perf_counter()
        tokens, positions, mask = _packed(drafts, texts, limit)
        logits, nodes = request.verify(tokens, positions, mask), tokens.shape[1]
        targets = _Targets(logits, texts, drafts, limit > 0, process, self.temperature)
        near = request.neighbours if isinstance(self.method.rule, Lantern) else None
        found = [
            self._accept(row, draft, targets, int(limit[row]), None if near is None else near[row])
            for row, draft in enumerate(drafts)
        ]
        path, count = _paths(found, nodes)
        request.commit(path, count)
        done = time.perf_counter()
        self._learn(drafts, found, logits)
        self.method.trees.observe(asked if nodes > 1 else 1, done - drafted, count, limit)
        self.drafting += drafted - begun + time.perf_counter() - done
        rows: list[tuple[list[int], np.ndarray]] = [
            ([], after[:0]) if accepted is None else (accepted.tokens.tolist(), after[accepted.path])
            for accepted, after in zip(found, logits, strict=True)
        ]
        return Step(rows, nodes)

    def _learn(self, drafts: Sequence[Draft], found: Sequence[Accepted | None], logits: np.ndarray) -> None:
        """Let the drafters of the rows that go on take note of what was verified."""
        for text, draft, accepted, after in zip(self._texts, drafts, found, logits, strict=True):
            if accepted is not None:
                text.observe(Verified(draft, accepted, self._top(after)))
                self.method.shapes.observe(draft.tree, accepted.path)

    def _draft(self, row: int, text: Sequence[int], limit: int, nodes: int) -> Draft:
        """What a row proposes; nothing where it may have one token alone."""
        if limit < 2 or nodes < 2:
            return self._root(text[-1] if limit else 0)
        plan = self.method.shapes.tree(nodes)
        decisions = Uniforms(self.streams.numbers(row, self._drafted[row], plan.nodes, drafting=True))
        draft = self._texts[row].propose(plan, decisions)
        self._drafted[row] += decisions.used
        tokens, name = draft.tokens, self.method.drafter.name
        if draft.tree.nodes > plan.nodes or int(tokens.max()) >= self.vocabulary or tokens[0] != text[-1]:
            raise InputError(
                f"the drafter '{name}' proposed {draft.tree.nodes} nodes from token {tokens[0]} on, the largest of "
                f"them {tokens.max()}; at most {plan.nodes} below {self.vocabulary} fit after token {text[-1]}"
            )
        return draft

    def _accept(
        self, row: int, draft: Draft, targets: _Targets, limit: int, near: NDArray[np.int64] | None
    ) -> Accepted | None:
        """What a row commits; None where it has ended. ``near`` [nodes, k] are the neighbours of its nodes' tokens."""
        if not limit:
            return None
        cut, kept = shallow(draft, limit)
        decisions = Uniforms(self.streams.numbers(row, self._decided[row], cut.tree.nodes))
        rule = self.method.rule
        if isinstance(rule, Lantern) and near is not None:
            rule = rule.among(dict(zip(draft.tokens.tolist(), near, strict=False)))
        accepted = rule.verify(cut, _RowTargets(targets, row, kept), decisions)
        self._decided[row] += decisions.used
        return Accepted(kept[accepted.path], accepted.tokens)

    def _top(self, logits: Logits) -> Rows | None:
        return _Top(logits, self.method.drafter.tops) if self.method.drafter.tops else None

    def _root(self, token: int) -> Draft:
        """A draft that proposes nothing."""
        return Draft(Tree.chain(1), np.array([token]), self.method.drafter.drawn)


def shallow(draft: Draft, limit: int) -> tuple[Draft, NDArray[np.int64]]:
    """The part of a draft of which at most ``limit`` tokens are committed, and its nodes' indices in the draft."""
    if int(draft.tree.depth.max()) < limit:
        return draft, np.arange(draft.tree.nodes)
    tree, kept = draft.tree.keep(draft.tree.depth < limit)
    q = draft.q
    inner = (
        {new: q[old] for new, old in enumerate(kept.tolist()) if tree.children[new]}
        if q is not None
        else None
    )
    return Draft(tree, draft.tokens[kept], draft.drawn, inner), kept


def _paths(found: Sequence[Accepted | None], nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """The accepted nodes [batch, nodes] and how many they are [batch]."""
    path, count = np.zeros((len(found), nodes), np.int64), np.zeros(len(found), np.int64)
    for row, accepted in enumerate(found):
        if accepted is not None:
            count[row] = len(accepted.path)
            path[row, : count[row]] = accepted.path
    return path, count


def _packed(
    drafts: Sequence[Draft], texts: Sequence[Sequence[int]], limit: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and positions [batch, nodes] and the mask [batch, nodes, nodes] of every row's tree, padded behind it.

    Nodes that are deeper than a row may commit have no position: it might be beyond the model's context.
    """
    nodes = max(draft.tree.nodes for draft in drafts)
    tokens = np.zeros((len(drafts), nodes), np.int64)
    positions = np.full((len(drafts), nodes), PADDING, np.int64)
    mask = np.zeros((len(drafts), nodes, nodes), bool) | np.eye(nodes, dtype=bool)
    for row, (draft, text) in enumerate(zip(drafts, texts, strict=True)):
        if limit[row]:
            size, depth = draft.tree.nodes, draft.tree.depth
            tokens[row, :size] = draft.tokens
            positions[row, :size] = np.where(depth < limit[row], len(text) - 1 + depth, PADDING)
            mask[row, :size, :size] = draft.tree.mask
    return tokens, positions, mask


class _Targets:
    """The distributions after the nodes of all rows, computed when one is asked for.

    A caller's processors see all rows of the batch at once, as without speculation: each with its text down to the node
    of the same number, or to the root where its tree has fewer.
    """

    def __init__(
        self,
        logits: np.ndarray,
        texts: Sequence[Sequence[int]],
        drafts: Sequence[Draft],
        live: NDArray[np.bool_],
        process: Process,
        temperature: float,
    ) -> None:
        self.logits, self.texts, self.drafts, self.live = logits, texts, drafts, live
        self.process, self.temperature = process, temperature
        self._known: dict[int, Floats] = {}

    def at(self, node: int) -> Floats:
        """The distributions [batch, vocabulary] after the nodes of this number."""
        if node not in self._known:
            places = [node if node < draft.tree.nodes else 0 for draft in self.drafts]
            below = [draft.tree.path(at)[1:] for draft, at in zip(self.drafts, places, strict=True)]
            histories = [
                [*text, *draft.tokens[list(path)].tolist()] if path else text
                for text, draft, path in zip(self.texts, self.drafts, below, strict=True)
            ]
            logits = self.process(histories, self.logits[np.arange(len(places)), places], self.live)
            self._known[node] = softmax(logits) if self.temperature else _one_hot(logits)
        return self._known[node]


def _one_hot(logits: Logits) -> Floats:
    """All probability on the likeliest token, the first of equals."""
    made = np.zeros(logits.shape)
    made[np.arange(len(logits)), logits.argmax(axis=-1)] = 1
    return made


@dataclass(frozen=True)
class _RowTargets:
    """One row's distributions, of nodes that are ``kept`` of its draft."""

    targets: _Targets
    row: int
    kept: NDArray[np.int64]

    def __getitem__(self, node: int, /) -> Floats:
        return self.targets.at(int(self.kept[node]))[self.row]


@dataclass(frozen=True)
class _Top:
    """The likeliest ids after each node by logits [nodes, vocabulary], computed when they are asked for."""

    logits: np.ndarray
    count: int

    def __getitem__(self, node: int, /) -> NDArray[np.int64]:
        row = self.logits[node]
        count = min(self.count, len(row))
        found = np.sort(np.argpartition(-row, count - 1)[:count])
        return found[np.argsort(-row[found], kind="stable")]
