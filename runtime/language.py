"""Generation: prompts, drawing tokens, stops, batches, streaming; the loop below is that of the schedule."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from tokopt.errors import InputError, TokoptError
from tokopt.runtime.chat import Message, choose_template, render_chat
from tokopt.runtime.encode import Encoded, encode
from tokopt.runtime.engines.base import Stateful
from tokopt.runtime.format.manifest import Manifest, file_path
from tokopt.runtime.format.schedule import emits_tokens
from tokopt.runtime.inputs import Interface, count_rows
from tokopt.runtime.loop import NO_LIMIT, PADDING, Emission, Request, chunk_size, prompt_slots
from tokopt.runtime.numerics import OutputCheck
from tokopt.runtime.sampling import LogitsProcessor, Sampling, choose, log_probabilities
from tokopt.runtime.selftest import TaskCheck, run_selftests
from tokopt.runtime.text import TextStream, Tokenizer, read_tokenizer

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
    pieces: list[str] = field(default_factory=list[str])

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

    def __init__(self, path: Path, manifest: Manifest, sessions: Stateful) -> None:
        assert manifest.generation is not None
        self.path, self.manifest, self.sessions = path, manifest, sessions
        for name in manifest.programs:
            sessions.best(name, batch=1)  # what cannot be loaded is refused now
        self.settings, self.endless = manifest.generation, manifest.schedule.endless
        entries = [entry for entry in manifest.schedule.entries if entry.role != "encode"]
        self.draws = any(emits_tokens(manifest.programs[entry.program]) for entry in entries)
        self.interface = Interface.of(manifest)
        self.statistics = Statistics()
        self._tokenizer: Tokenizer | None = None

    def open(self, batch: int, slots: int, inputs: Mapping[str, Any] | None = None) -> Request:
        """A new request of so many rows, whose cache begins with so many slots; for driving the model oneself."""
        return Request(self.manifest, self.sessions, batch, slots, self._encode(batch, inputs))

    @property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer; raises InputError when it has none."""
        if self._tokenizer is None:
            if self.manifest.tokenizer is None:
                raise InputError(f"{self.path} has no tokenizer; pass token ids instead of text")
            text = read_tokenizer(file_path(self.path, self.manifest.tokenizer))
            self._tokenizer = Tokenizer(text, self.settings.vocabulary)
        return self._tokenizer

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        template: str | None = None,
        continued: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation (``[{"role": "user", "content": "..."}]``), ready for the answer.

        ``template`` names one of the model's chat templates, ``continued`` the part of the last message (``"content"``)
        that the model goes on with instead of answering. ``variables`` are for the template: ``tools``, a list of JSON
        schemas, ``documents``, ``add_generation_prompt=False`` and those of its own, ``enable_thinking`` for example.
        Raises InputError when there is no such template, or it rejects the conversation or takes too much.
        """
        settings = self.settings
        templates = dict(settings.chat_templates)
        if settings.chat_template is not None:
            templates["default"] = settings.chat_template
        chosen = choose_template(templates, template, tools=variables.get("tools") is not None)
        given = {**self._special_tokens(), "add_generation_prompt": continued is None, **variables}
        return self.tokenizer.encode_parts(render_chat(chosen, messages, given, continued))

    def _special_tokens(self) -> Mapping[str, str]:
        """What chat templates spell by name."""
        if self.settings.special_tokens is not None:
            return self.settings.special_tokens
        ids = {"bos_token": self.settings.bos, "eos_token": next(iter(self.settings.eos), None)}
        return {name: self.tokenizer.token(index) for name, index in ids.items() if index is not None}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        processors: Sequence[LogitsProcessor] = (),
        inputs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Generate a text for one prompt (:class:`Generated`) or for several (a list of them).

        A prompt is text or token ids; prompts of unequal length are padded on the left. ``inputs`` are the arrays that
        a model takes beside its prompts (images, for example) by name, with a row for every prompt. Raises InputError,
        before anything runs, for an empty prompt, one longer than the context, a token id out of range, inputs that do
        not fit, a cache that does not fit into memory, and sampling options where the model draws the tokens itself;
        raises TokoptError when the model gives NaN.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer)))
        rows = self._rows(cast("list[Prompt]", [prompts] if single else list(prompts)), stop)
        for _ in self._steps(rows, max_tokens, sampling or Sampling(), processors, inputs):
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
        inputs: Mapping[str, Any] | None = None,
    ) -> Iterator[str]:
        """Pieces of the generated text as they come, whole characters only; as :meth:`generate` otherwise."""
        self.tokenizer  # noqa: B018  # refuse before anything runs
        rows = self._rows([prompt], stop)
        shown = 0
        for _ in self._steps(rows, max_tokens, sampling or Sampling(), processors, inputs):
            yield from rows[0].pieces[shown:]
            shown = len(rows[0].pieces)

    def tokens(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        processors: Sequence[LogitsProcessor] = (),
        inputs: Mapping[str, Any] | None = None,
    ) -> Iterator[int]:
        """New token ids as they come; the end token, if it is reached, is the last."""
        rows = self._rows([prompt], ())
        shown = rows[0].prompt
        for _ in self._steps(rows, max_tokens, sampling or Sampling(), processors, inputs):
            yield from rows[0].history[shown:]
            shown = len(rows[0].history)

    def score(self, tokens: Sequence[int], *, inputs: Mapping[str, Any] | None = None) -> np.ndarray:
        """Log-probability of every token but the first, given those before it [len(tokens) - 1] float64.

        Raises InputError for a model that draws its tokens itself.
        """
        if self.draws:
            raise InputError(
                f"{self.path} draws its tokens itself and gives no probabilities; generate with it"
            )
        ids = self._ids(tokens)
        request, size = self.open(1, len(ids), inputs), chunk_size(self.manifest, "prefill")
        found: list[np.ndarray] = []
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            places = np.arange(len(part))
            logits = request.step(np.array([part]), start + places[None], places, role="prefill").logits
            assert logits is not None
            following = ids[start + 1 : start + 1 + len(part)]
            found.append(log_probabilities(logits[0, : len(following)], following))
        return np.concatenate(found)

    def selftest(self) -> dict[str, tuple[OutputCheck | TaskCheck, ...]]:
        """Run every form of every program on the inputs stored in the artifact; its outputs compared with those stored.

        The key is the program's name, for the form of a batch of one with that form's name: ``step.onnxruntime``.
        """
        return run_selftests(self.path, self.manifest, lambda: self.sessions)

    def __repr__(self) -> str:
        layers = {state.layer for state in self.manifest.states if state.layer is not None}
        return f"<LanguageModel {self.path.name}: {len(layers)} layers>"

    # ------------------------------------------------------------------------------------------- the loop

    def _rows(self, prompts: Sequence[Prompt], stop: Sequence[str]) -> list[_Row]:
        if not prompts:
            raise InputError("there is no prompt; give at least one")
        if stop:
            self.tokenizer  # noqa: B018  # stop strings need text
        rows: list[_Row] = []
        for prompt in prompts:
            ids = self._ids(prompt)
            stream = TextStream(self.tokenizer, stop) if self.manifest.tokenizer else None
            rows.append(_Row(ids, len(ids), stream))
        return rows

    def _ids(self, prompt: Prompt) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        if not ids:
            raise InputError("the prompt is empty; give at least one token")
        if len(ids) > self.settings.context and not self.endless:
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

    def _encode(self, batch: int, inputs: Mapping[str, Any] | None) -> Encoded | None:
        """Run the programs that come before the prompt on the caller's arrays."""
        if not self.interface.programs and not inputs:
            return None
        feed = self.interface.feed((), inputs or {})
        rows = count_rows(self.interface.inputs, feed)
        if rows is not None and rows != batch:
            raise InputError(
                f"the inputs have {rows} rows and there are {batch} prompts; give one row for each"
            )
        return encode(self.manifest, self.sessions, feed, batch)

    def _steps(
        self,
        rows: list[_Row],
        max_tokens: int,
        sampling: Sampling,
        processors: Sequence[LogitsProcessor],
        inputs: Mapping[str, Any] | None,
    ) -> Iterator[None]:
        """Generate in place; yields whenever the rows that are not finished have new tokens."""
        if max_tokens < 0:
            raise InputError(f"max_tokens is {max_tokens}, it must be at least 0")
        if self.draws and (sampling != Sampling() or processors):
            raise InputError(f"{self.path} draws its tokens itself; leave sampling and processors out")
        self.statistics = Statistics(prompt_tokens=sum(row.prompt for row in rows))
        if not max_tokens:
            for row in rows:
                row.finish = "length"
            return
        draw = _Draw(sampling, processors, len(rows))
        longest = max(row.prompt for row in rows)
        clock = time.perf_counter()
        request = self.open(len(rows), prompt_slots(self.manifest, longest, max_tokens), inputs)
        emission = request.prefill([row.history for row in rows], self._left(rows, max_tokens))
        self.statistics.prefill_seconds = time.perf_counter() - clock
        clock = time.perf_counter()
        while True:
            self._commit(rows, draw(rows, emission), max_tokens)
            self._note(request, rows, time.perf_counter() - clock)
            yield
            if all(row.finish for row in rows):
                return
            live = np.array([not row.finish for row in rows])
            token = np.where(live, [row.history[-1] for row in rows], 0)[:, None]
            position = np.where(live, [len(row.history) - 1 for row in rows], PADDING)[:, None]
            limit = self._left(rows, max_tokens) if self.draws else None
            emission = request.step(token, position, limit=limit)

    def _left(self, rows: list[_Row], max_tokens: int) -> np.ndarray:
        """The most tokens that each row may still have [batch]."""
        context = NO_LIMIT if self.endless else self.settings.context
        left = (max(min(max_tokens - len(row.new), context - len(row.history)), 1) for row in rows)
        return np.array([0 if row.finish else count for row, count in zip(rows, left, strict=True)], np.int64)

    def _commit(self, rows: list[_Row], found: Sequence[Sequence[int]], max_tokens: int) -> None:
        """Give every row its new tokens, as far as it goes on."""
        for row, tokens in zip(rows, found, strict=True):
            for token in tokens:
                if not row.finish:
                    self._take(row, token, last=len(row.new) + 1 == max_tokens)

    def _take(self, row: _Row, token: int, last: bool) -> None:
        row.history.append(token)
        ended = token in self.settings.eos
        if row.stream and not ended:
            row.pieces.append(row.stream.add(token))
        if ended or (row.stream and row.stream.stopped):
            row.finish = "stop"
        elif last or (len(row.history) >= self.settings.context and not self.endless):
            row.finish = "length"
        if row.finish and row.stream:
            row.pieces.append(row.stream.finish())

    def _note(self, request: Request, rows: list[_Row], seconds: float) -> None:
        done, buffers = self.statistics, request.buffers
        done.new_tokens = sum(len(row.new) for row in rows)
        done.decode_seconds = seconds
        done.cache_slots, done.cache_bytes = max(buffers.slots.values(), default=0), buffers.nbytes


class _Draw:
    """The next tokens of every row: those that the model drew, or one that is chosen by its logits."""

    def __init__(self, sampling: Sampling, processors: Sequence[LogitsProcessor], batch: int) -> None:
        self.temperature, self.streams = sampling.temperature, sampling.streams(batch)
        self.chain = [*processors, *sampling.processors()]
        self.step = 0

    def __call__(self, rows: list[_Row], emission: Emission) -> list[list[int]]:
        """Raise TokoptError for logits that are no numbers."""
        self.step += 1
        if emission.logits is None:
            assert emission.tokens is not None and emission.count is not None
            return [row[:count].tolist() for row, count in zip(emission.tokens, emission.count, strict=True)]
        logits = emission.logits[:, -1]
        if np.isnan(logits.max()):
            raise TokoptError(f"the model gave NaN at step {self.step}; its weights or its input are damaged")
        for process in self.chain:
            logits = process([row.history for row in rows], logits)
        return [[int(token)] for token in choose(logits, self.temperature, self.streams)]
