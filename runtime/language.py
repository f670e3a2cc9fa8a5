"""Generation: prefill, decoding, batches, streaming. Everything about tokens is compiled; this is the loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokopt.errors import InputError, TokoptError
from tokopt.runtime.buffers import BLOCK, capacity
from tokopt.runtime.engines.onnxruntime import PORTABLE, Sessions
from tokopt.runtime.format.manifest import Manifest, file_path
from tokopt.runtime.numerics import OutputCheck
from tokopt.runtime.sampling import LogitsProcessor, Sampling, choose, log_probabilities
from tokopt.runtime.selftest import run_selftest
from tokopt.runtime.text import TextStream, Tokenizer, render_chat

PREFILL = 256
"""Prompt tokens per call of ``step``; bounds the memory that a long prompt's attention takes."""

PADDING = -1
"""Position of padding."""

if TYPE_CHECKING:
    from tokopt.runtime.engines.tensorrt import Engines

Prompt = str | Sequence[int]
"""Text, or token ids."""


@dataclass
class Statistics:
    """What a generation did: counts over all rows, seconds, and the cache at its end."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cache_slots: int = 0
    cache_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding, over all rows."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Generated:
    """One generated text: the new token ids, their text (None without a tokenizer), and why it ended.

    ``finish`` is ``"stop"`` (an end token or a stop string) or ``"length"``.
    """

    tokens: tuple[int, ...]
    text: str | None
    finish: str


@dataclass
class _Row:
    """One text being generated."""

    history: list[int]
    prompt: int
    stream: TextStream | None = None
    finish: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def new(self) -> list[int]:
        return self.history[self.prompt :]


class LanguageModel:
    """A loaded causal language model.

    >>> model = load("smollm2.tokopt")                                    # doctest: +SKIP
    >>> for piece in model.stream("The capital of France is"):            # doctest: +SKIP
    ...     print(piece, end="")
    >>> model.generate(["One prompt", "another"], max_tokens=20)          # doctest: +SKIP
    """

    def __init__(self, path: Path, manifest: Manifest, sessions: Sessions | Engines) -> None:
        assert manifest.generation is not None
        self.path, self.manifest, self.sessions = path, manifest, sessions
        for name in manifest.programs:
            sessions.best(name, batch=1)  # what cannot be loaded is refused now
        self.settings = manifest.generation
        self.prefill = min(PREFILL, manifest.programs["step"].ranges["tokens"].max or PREFILL)
        self.statistics = Statistics()
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer; raises InputError when it has none."""
        if self._tokenizer is None:
            if self.manifest.tokenizer is None:
                raise InputError(f"{self.path} has no tokenizer; pass token ids instead of text")
            text = file_path(self.path, self.manifest.tokenizer).read_text(encoding="utf-8")
            self._tokenizer = Tokenizer(text, self.settings.vocabulary)
        return self._tokenizer

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation (``[{"role": "user", "content": "..."}]``), ready for the answer."""
        names = [
            "" if index is None else self.tokenizer.token(index)
            for index in (self.settings.bos, next(iter(self.settings.eos), None))
        ]
        return self.tokenizer.encode_parts(render_chat(self.settings.chat_template, messages, *names))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        processors: Sequence[LogitsProcessor] = (),
    ) -> Any:
        """Generate a text for one prompt (:class:`Generated`) or for several (a list of them).

        A prompt is text or token ids; prompts of unequal length are padded on the left. Raises InputError,
        before anything runs, for an empty prompt, one longer than the context, a token id out of range, and a
        cache that does not fit into memory; raises TokoptError when the model gives NaN.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer)))
        rows = self._rows([prompts] if single else list(prompts), stop)  # type: ignore[list-item]
        for _ in self._steps(rows, max_tokens, sampling or Sampling(), processors):
            pass
        done = [
            Generated(tuple(row.new), "".join(row.pieces) if row.stream else None, row.finish) for row in rows
        ]
        return done[0] if single else done

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        processors: Sequence[LogitsProcessor] = (),
    ) -> Iterator[str]:
        """Pieces of the generated text as they come, whole characters only; as :meth:`generate` otherwise."""
        self.tokenizer  # noqa: B018  # refuse before anything runs
        rows = self._rows([prompt], stop)
        shown = 0
        for _ in self._steps(rows, max_tokens, sampling or Sampling(), processors):
            yield from rows[0].pieces[shown:]
            shown = len(rows[0].pieces)

    def tokens(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        processors: Sequence[LogitsProcessor] = (),
    ) -> Iterator[int]:
        """New token ids as they come; the end token, if it is reached, is the last."""
        rows = self._rows([prompt], ())
        for _ in self._steps(rows, max_tokens, sampling or Sampling(), processors):
            yield rows[0].history[-1]

    def score(self, tokens: Sequence[int]) -> np.ndarray:
        """Log-probability of every token but the first, given those before it [len(tokens) - 1] float64."""
        ids = self._ids(tokens)
        session = _Session(self, 1, len(ids))
        found = []
        for start in range(0, len(ids), self.prefill):
            part = np.array([ids[start : start + self.prefill]])
            positions = np.arange(start, start + part.shape[1])[None]
            logits = session.step(part, positions, np.arange(part.shape[1]))[0]
            following = ids[start + 1 : start + 1 + part.shape[1]]
            found.append(log_probabilities(logits[: len(following)], following))
        return np.concatenate(found)

    def selftest(self) -> dict[str, tuple[OutputCheck, ...]]:
        """Run every form of every program on the inputs stored in the artifact; its outputs compared with those stored.

        The key is the program's name, for the form of a batch of one with that form's name: ``step.onnxruntime``.
        """
        if not isinstance(self.sessions, Sessions):
            raise InputError(
                f"the stored inputs of {self.path} have another number of slots than its engines; run the "
                "self-test with the default backend"
            )
        found = {}
        for name in self.manifest.programs:
            for form in self.sessions.forms(name):
                key, rows = (name, None) if form == PORTABLE else (f"{name}.{form}", 1)
                session = self.sessions.get(name, form)
                found[key] = run_selftest(self.path, self.manifest, name, session, rows)
        return found

    def __repr__(self) -> str:
        return f"<LanguageModel {self.path.name}: {len(self.manifest.states) // 2 - 1} layers>"

    # ------------------------------------------------------------------------------------------- the loop

    def _rows(self, prompts: Sequence[Prompt], stop: Sequence[str]) -> list[_Row]:
        if not prompts:
            raise InputError("there is no prompt; give at least one")
        if stop:
            self.tokenizer  # noqa: B018  # stop strings need text
        rows = []
        for prompt in prompts:
            ids = self._ids(prompt)
            stream = TextStream(self.tokenizer, stop) if self.manifest.tokenizer else None
            rows.append(_Row(ids, len(ids), stream))
        return rows

    def _ids(self, prompt: Prompt) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        if not ids:
            raise InputError("the prompt is empty; give at least one token")
        if len(ids) > self.settings.context and not self.settings.endless:
            raise InputError(
                f"the prompt has {len(ids)} tokens and the model's context holds {self.settings.context}; "
                "shorten it"
            )
        for index in ids:
            if not 0 <= index < self.settings.vocabulary:
                raise InputError(
                    f"token id {index} is outside the vocabulary of {self.settings.vocabulary} tokens"
                )
        return ids

    def _steps(
        self, rows: list[_Row], max_tokens: int, sampling: Sampling, processors: Sequence[LogitsProcessor]
    ) -> Iterator[None]:
        """Generate in place; yields after every token of the rows that are not finished."""
        if max_tokens < 0:
            raise InputError(f"max_tokens is {max_tokens}, it must be at least 0")
        self.statistics = Statistics(prompt_tokens=sum(row.prompt for row in rows))
        if not max_tokens:
            for row in rows:
                row.finish = "length"
            return
        chain, streams = [*processors, *sampling.processors()], sampling.streams(len(rows))
        read = max(row.prompt for row in rows)  # tokens in the cache before anything is evicted
        if self.settings.endless:
            read = min(read, self.settings.compact_every)
        clock = time.perf_counter()
        session = _Session(self, len(rows), read + min(max_tokens, BLOCK))
        logits = session.prefill([row.history for row in rows])
        self.statistics.prefill_seconds = time.perf_counter() - clock
        clock = time.perf_counter()
        for count in range(1, max_tokens + 1):
            if np.isnan(logits.max()):
                raise TokoptError(f"the model gave NaN at step {count}; its weights or its input are damaged")
            for process in chain:
                logits = process([row.history for row in rows], logits)
            chosen = choose(logits, sampling.temperature, streams)
            for row, token in zip(rows, chosen, strict=True):
                if not row.finish:
                    self._take(row, int(token), last=count == max_tokens)
            self._note(session, rows, time.perf_counter() - clock)
            yield
            if all(row.finish for row in rows):
                return
            live = np.array([not row.finish for row in rows])
            token = np.where(live, [row.history[-1] for row in rows], 0)[:, None]
            position = np.where(live, [len(row.history) - 1 for row in rows], PADDING)[:, None]
            logits = session.step(token, position, np.array([-1]))[:, 0]

    def _take(self, row: _Row, token: int, last: bool) -> None:
        row.history.append(token)
        ended = token in self.settings.eos
        if row.stream and not ended:
            row.pieces.append(row.stream.add(token))
        if ended or (row.stream and row.stream.stopped):
            row.finish = "stop"
        elif last or (len(row.history) >= self.settings.context and not self.settings.endless):
            row.finish = "length"
        if row.finish and row.stream:
            row.pieces.append(row.stream.finish())

    def _note(self, session: _Session, rows: list[_Row], seconds: float) -> None:
        done = self.statistics
        done.new_tokens = sum(len(row.new) for row in rows)
        done.decode_seconds = seconds
        done.cache_slots, done.cache_bytes = max(session.buffers.slots.values()), session.buffers.nbytes


class _Session:
    """One batch on its way: the buffers, how far they are filled, and the step bound to them."""

    def __init__(self, model: LanguageModel, batch: int, slots: int) -> None:
        manifest = model.manifest
        self.buffers: Any = model.sessions.buffers(batch, capacity(slots))
        self.program: Any = model.sessions.bind("step", self.buffers)
        compacts = "compact" in manifest.programs
        self.compactor = model.sessions.best("compact", batch) if compacts else None
        self.every, self.since = model.settings.compact_every, 0
        self.endless, self.longest = model.settings.endless, model.prefill
        self.used = dict.fromkeys(self.buffers.slots, 0)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Read the prompts, the shorter ones padded on the left; logits [batch, vocabulary] of their ends."""
        longest = max(map(len, prompts))
        tokens = np.zeros((len(prompts), longest), np.int64)
        positions = np.full((len(prompts), longest), PADDING)
        for row, ids in enumerate(prompts):
            tokens[row, longest - len(ids) :] = ids
            positions[row, longest - len(ids) :] = np.arange(len(ids))
        logits = np.empty(0)
        read, size = (self.step, self.every) if self.endless else (self._run, self.longest)
        for start in range(0, longest, size):
            part = slice(start, start + size)
            logits = read(tokens[:, part], positions[:, part], np.array([-1]))
        self.compact()
        return logits[:, 0]

    def step(self, tokens: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Logits [batch, rows, vocabulary] after new tokens; compacts when it is time."""
        logits = self._run(tokens, positions, rows)
        self.since += tokens.shape[1]
        if self.every and self.since >= self.every:
            self.compact()
        return logits

    def compact(self) -> None:
        """Let the eviction policy drop what it will, and give back the memory."""
        self.since = 0
        if self.compactor is None:
            return
        self.buffers.advance(self.compactor)
        for axis in self.used:
            self.used[axis] = self._count(axis)
        self.buffers.resize({axis: used + (self.every or BLOCK) for axis, used in self.used.items()})
        self.program.bind()

    def _count(self, axis: str) -> int:
        """Slots in use: of ``slots`` all that ``length`` says, of ``slots_3`` its layer's, of ``recent`` its own."""
        if axis == "recent":
            return int(self.buffers.read("recent_length").max())
        lengths = self.buffers.read("length").max(axis=0, keepdims=True).reshape(-1)
        return int(lengths[int(axis.removeprefix("slots").removeprefix("_") or 0)])

    def _run(self, tokens: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        count = tokens.shape[1]
        needed = {axis: used + count for axis, used in self.used.items()}
        slots = self.buffers.slots
        if any(needed[axis] > slots[axis] for axis in slots):
            self.buffers.resize({axis: max(capacity(needed[axis]), slots[axis]) for axis in slots})
            self.program.bind()
        causal = np.tril(np.ones((count, count), bool))
        feed = {
            "tokens": np.ascontiguousarray(tokens),
            "positions": np.ascontiguousarray(positions),
            "mask": np.ascontiguousarray(np.broadcast_to(causal, (len(tokens), count, count))),
            "rows": rows,
        }
        self.used = needed
        return self.program.run(feed)["logits"]
