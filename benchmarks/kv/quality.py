"""What eviction costs: perplexity after a long prompt, and retrieval of a fact hidden in one.

A prompt is read once; then the cache is cut to each budget in turn, by writing the state ``budget``, and what
follows is scored while the policy goes on evicting. The last token of the prompt has seen everything: its
prediction is not counted.
"""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.kv.policies import EVERY
from tokopt.runtime import LanguageModel
from tokopt.runtime.loop import PREFILL
from tokopt.runtime.sampling import log_probabilities

PROMPTS = {"SmolLM2-135M-Instruct": (1024, 4096), "Gemma-3-270M": (1024,)}
SCORED, WINDOWS = 256, 8
"""Perplexity: tokens read before eviction by model, tokens scored after it, and texts."""

CONTEXTS = {"SmolLM2-135M-Instruct": (1024, 2048, 4096), "Gemma-3-270M": (1024, 2048)}
DEPTHS = (0.15, 0.5, 0.85)
"""Retrieval: lengths of the prompt in tokens by model, and how far in the fact stands."""

SHARES = (0.5, 0.25, 0.125)
"""Budgets, as shares of the prompt."""

SAYING = "\n\nRemember: the secret code"
CITIES = (
    "Lisbon",
    "Oslo",
    "Cairo",
    "Lima",
    "Quito",
    "Hanoi",
    "Perth",
    "Dakar",
    "Turin",
    "Osaka",
    "Leeds",
    "Accra",
)


def documentation() -> str:
    """Python's documentation of the language, as ``help()`` shows it."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def perplexity(model: LanguageModel, length: int, shares: Sequence[float]) -> dict[str, float]:
    """Nats per token after a prompt of ``length`` tokens, by share; a perplexity is their exponential."""
    bos, ids = _tokens(model)
    starts = np.linspace(0, len(ids) - length - SCORED - 1, WINDOWS).astype(int)
    losses: dict[str, list[float]] = {str(share): [] for share in shares}
    for start in starts:
        window = [*bos, *ids[start : start + length + SCORED + 1 - len(bos)]]
        read = Read(model, window[:length], SCORED)
        for share in shares:
            losses[str(share)].append(float(-read.score(window[length:], share).logs.mean()))
    return {share: float(np.mean(found)) for share, found in losses.items()}


def retrieval(model: LanguageModel, length: int, shares: Sequence[float]) -> dict[str, Any]:
    """Of a fact hidden in ``length`` tokens, by share: nats per token, and the share of exact answers."""
    scores: dict[str, list[Scored]] = {str(share): [] for share in shares}
    for prompt, answer in haystacks(model, length):
        read = Read(model, prompt[:-1], len(answer))
        for share in shares:
            scores[str(share)].append(read.score([prompt[-1], *answer], share))
    return {
        share: {
            "nats": float(np.mean([-one.logs.mean() for one in many])),
            "exact": float(np.mean([one.first for one in many])),
        }
        for share, many in scores.items()
    }


def haystacks(model: LanguageModel, context: int) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts of ``context`` tokens with a fact at each depth, and the answer that they ask for."""
    bos, ids = _tokens(model)
    generator = np.random.default_rng(context)
    for depth in DEPTHS:
        city = CITIES[generator.integers(len(CITIES))]
        code = str(generator.integers(10_000, 99_999))
        encoded = [
            model.tokenizer.encode(piece)[len(bos) :]
            for piece in (f"{SAYING} of {city} is {code}.\n\n", f"{SAYING} of {city} is", f" {code}")
        ]
        fact, question, answer = encoded
        room = context - len(bos) - len(fact) - len(question)
        start = int(generator.integers(len(ids) - room))
        hay, before = ids[start : start + room], int(depth * room)
        yield [*bos, *hay[:before], *fact, *hay[before:], *question], answer


def _tokens(model: LanguageModel) -> tuple[list[int], list[int]]:
    """The token that begins every text of this model, if any, and those of the documentation."""
    ids = model.tokenizer.encode(documentation())
    begin = int(ids[0] == model.settings.bos)
    return ids[:begin], ids[begin:]


# --- one prompt, many budgets -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Log-probability of every token, and whether each was the most probable one."""

    logs: np.ndarray
    first: bool


class Read:
    """A prompt that was read and not yet evicted from, to be gone on from under several budgets."""

    def __init__(self, model: LanguageModel, prompt: Sequence[int], room: int) -> None:
        self.model, self.length = model, len(prompt)
        self.session = model.open(1, len(prompt) + room)
        entry = self.session.entry("prefill")
        for start in range(0, len(prompt), PREFILL):
            part = np.array([prompt[start : start + PREFILL]])
            self.session.emit(entry, part, start + np.arange(part.shape[1])[None])
        buffers = self.session.buffers
        self.states = {name: buffers.read(name) for name in buffers.values}
        self.slots, self.used = dict(buffers.slots), dict(self.session.used)

    def score(self, tokens: Sequence[int], share: float) -> Scored:
        """Score ``tokens[1:]``, where ``tokens[0]`` follows what was read, under a budget."""
        session = self._restored(share)
        logs, first = [], True
        for begin in range(0, len(tokens) - 1, EVERY):
            part = np.array([tokens[begin : begin + EVERY]])[:, : len(tokens) - 1 - begin]
            positions = self.length + begin + np.arange(part.shape[1])[None]
            logits = session.step(part, positions, np.arange(part.shape[1])).logits[0]
            wanted = tokens[begin + 1 : begin + 1 + part.shape[1]]
            logs.append(log_probabilities(logits, wanted))
            first &= bool((logits.argmax(axis=-1) == wanted).all())
        return Scored(np.concatenate(logs), first)

    def _restored(self, share: float) -> Any:
        session, buffers = self.session, self.session.buffers
        buffers.values = {name: buffers._value(value.copy()) for name, value in self.states.items()}
        buffers.slots, session.used = dict(self.slots), dict(self.used)
        session.since = [np.zeros_like(since) for since in session.since]
        if share < 1:
            budget = np.array([math.ceil(share * self.length)])
            name = next(state.name for state in self.model.manifest.states if state.kind == "budget")
            buffers.values[name] = buffers._value(budget)
        session.program.bind()
        session.after_prompt()
        return session
