"""One batch of texts being generated: drawing tokens, stops, streaming, and what it took."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from tokopt.arguments import described
from tokopt.errors import InputError, TokoptError
from tokopt.runtime.loop import NO_LIMIT, PADDING, Emission, Request
from tokopt.runtime.numerics import log_softmax
from tokopt.runtime.reading import Reading
from tokopt.runtime.sampling import Logits, LogitsProcessor, Sampling, Streams, TokenIds, choose
from tokopt.runtime.speculation.calls import Trees
from tokopt.runtime.speculation.host import HostSpeculation
from tokopt.runtime.speculation.lossless import Lossless
from tokopt.runtime.text import TextStream

Item = TypeVar("Item")

UNCHANGED = Lossless(True)


@dataclass(frozen=True)
class Statistics:
    """What a generation took: counts over all rows of its batch, seconds, and the cache at its end.

    A prompt's last call gives the first token, so that ``decode_calls`` for one text are one fewer than its new tokens,
    and fewer where a call commits several. ``commits[i]`` is how often a call gave a row i + 1 tokens, and
    ``decode_nodes`` the sum over calls of the nodes of their trees, 1 each without speculation. ``drafting_seconds``
    are those of decoding that a drafter of the host took.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cache_slots: int = 0
    cache_bytes: int = 0
    decode_calls: int = 0
    decode_nodes: int = 0
    commits: tuple[int, ...] = ()
    drafting_seconds: float = 0.0

    @property
    def tokens_per_call(self) -> float:
        """Tokens that a call gave a row; 1 without speculation."""
        calls = sum(self.commits)
        return sum(n * count for n, count in enumerate(self.commits, 1)) / calls if calls else 1.0

    @property
    def nodes_per_call(self) -> float:
        """Nodes of a call's tree, the committed token included; 1 without speculation."""
        return self.decode_nodes / self.decode_calls if self.decode_calls else 1.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding, over all rows."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Generated:
    """One generated text: the new token ids, their text (None without a tokenizer), and why it ended.

    ``finish`` is ``"stop"`` (an end token or a stop string), ``"length"``, or empty for a stream that still goes on.
    ``statistics`` are those of the call that made it, which all texts of a batch share; they do not count when two
    texts are compared. Nor do ``logprobs``, the logarithms of the probabilities that the model's own logits give the
    tokens, and ``top_logprobs``, the likeliest tokens in the place of each and theirs, likeliest first. Both are None
    where they are not asked for, but for the first of a model that draws tokens itself and says so. ``lossless`` says
    whether the text is one that the model would write without speculation, as probably, and if not, why.
    """

    tokens: tuple[int, ...]
    text: str | None
    finish: str
    statistics: Statistics = field(default_factory=Statistics, compare=False, repr=False)
    logprobs: tuple[float, ...] | None = field(default=None, compare=False, repr=False)
    top_logprobs: tuple[Mapping[int, float], ...] | None = field(default=None, compare=False, repr=False)
    lossless: Lossless = field(default=UNCHANGED, compare=False, repr=False)


@dataclass
class Text:
    """One text being generated: the ids of its prompt and of what follows, and its pieces as they are shown."""

    history: TokenIds
    prompt: int
    stream: TextStream | None = None
    finish: str = ""
    pieces: list[str] = field(default_factory=list[str])
    logprobs: list[float] = field(default_factory=list[float])
    top: list[dict[int, float]] = field(default_factory=list[dict[int, float]])
    cut: int = 0
    """Tokens that the text's last call committed behind its end."""

    @property
    def new(self) -> int:
        """How many tokens are new."""
        return len(self.history) - self.prompt


@dataclass(frozen=True)
class Limits:
    """What ends a text: ``most`` new tokens, ``context`` with those of its prompt (None: unbounded), one of ``eos``."""

    most: int
    context: int | None
    eos: tuple[int, ...]

    def left(self, text: Text) -> int:
        """The most tokens that a text may still have."""
        if text.finish:
            return 0
        room = NO_LIMIT if self.context is None else self.context - len(text.history)
        return max(min(self.most - text.new, room), 1)


class Draw:
    """The next tokens of every text: those that the model drew, or one that is chosen by its logits."""

    def __init__(
        self,
        sampling: Sampling,
        processors: Sequence[LogitsProcessor],
        streams: Streams,
        laws: Sequence[LogitsProcessor] = (),
    ) -> None:
        """``processors`` are a caller's own; behind them ``laws`` forbid tokens. ``streams`` have a row per text."""
        self.temperature, self.streams = sampling.temperature, streams
        self.own, self.laws, self.usual = tuple(processors), tuple(laws), tuple(sampling.processors())
        self.step = 0

    def __call__(self, texts: Sequence[Text], emission: Emission) -> list[list[int]]:
        """Raise TokoptError for logits that are no numbers, InputError for a processor that makes such."""
        self.step += 1
        if emission.logits is None:
            assert emission.tokens is not None and emission.count is not None
            return [row[:count].tolist() for row, count in zip(emission.tokens, emission.count, strict=True)]
        live = np.array([not text.finish for text in texts])
        logits = self.processed([text.history for text in texts], emission.logits[:, -1], live)
        return [[int(token)] for token in choose(logits, self.temperature, self.streams)]

    def processed(
        self, histories: Sequence[Sequence[int]], logits: Logits, live: NDArray[np.bool_]
    ) -> Logits:
        """The logits [batch, vocabulary] from which tokens are drawn; of the rows that are ``live``, each has one.

        Raises TokoptError for logits that are no numbers, InputError for a processor that makes such, and where the
        options together forbid every token.
        """
        if (row := _unusable(logits, live)) is not None:
            found = "NaN" if np.isnan(logits[row]).any() else "infinity"
            raise TokoptError(
                f"the model gave {found} at step {self.step}; its weights or its input are damaged"
            )
        for place, process in enumerate(self.own):
            logits = self._processed(place, process, histories, logits, live)
        for law in self.laws:
            logits = law(histories, logits)
        if self.laws and (row := _unusable(logits, live)) is not None:
            raise InputError(
                f"no token is left for row {row} at step {self.step} that grammar, min_tokens, logit_bias and "
                "processors all allow; forbid less"
            )
        for process in self.usual:
            logits = process(histories, logits)
        return logits

    def _processed(
        self,
        place: int,
        process: LogitsProcessor,
        histories: Sequence[Sequence[int]],
        logits: Logits,
        live: np.ndarray,
    ) -> Logits:
        """What a caller's own processor makes of logits, proved to be logits from which a token can be chosen."""
        name = (
            f"processor {place} ({getattr(process, '__name__', type(process).__name__)}) at step {self.step}"
        )
        shape = logits.shape
        try:
            returned = cast(object, process(histories, logits))
        except Exception as error:  # a caller's own code
            line = " ".join(str(error).split())[:300]
            raise InputError(f"{name} raised {type(error).__name__}: {line}") from error
        made = cast(Logits, returned)
        if not isinstance(returned, np.ndarray) or made.dtype.kind not in "fiu":
            raise InputError(
                f"{name} returned {described(cast(object, returned))}; return an array of numbers"
            )
        if made.shape != shape:
            raise InputError(
                f"{name} returned logits of shape {list(made.shape)}; return those that it is given, {list(shape)}"
            )
        if (row := _unusable(made, live)) is not None:
            raise InputError(
                f"{name} returned NaN or infinity for row {row}, or -infinity for all of its tokens; leave at least "
                "one token a finite logit"
            )
        return made


def _unusable(logits: np.ndarray, live: np.ndarray) -> int | None:
    """The first row of those that go on from which no token can be chosen: NaN, +infinity, or no finite number."""
    wrong = live & ~np.isfinite(logits.max(axis=-1))
    return int(wrong.argmax()) if wrong.any() else None


@dataclass(frozen=True)
class Likelihood:
    """The log-probability of a token, and those of the likeliest in its place."""

    own: float
    top: dict[int, float] = field(default_factory=dict[int, float])


@dataclass(frozen=True)
class Report:
    """What is said of every token: its log-probability, and as many of the likeliest tokens' as ``top``."""

    top: int

    def of(self, tokens: Sequence[int], logits: Logits) -> list[Likelihood]:
        """The tokens of one row, each after its logits [tokens, vocabulary]."""
        if not tokens:
            return []
        made = log_softmax(logits)
        order = (
            np.argsort(-made, axis=-1, kind="stable")[:, : self.top]
            if self.top
            else np.zeros((len(made), 0), int)
        )
        return [
            Likelihood(float(row[token]), {int(i): float(row[i]) for i in likeliest})
            for token, row, likeliest in zip(tokens, made, order, strict=True)
        ]


@dataclass
class Calls:
    """The calls of a generation after its prompt: how many, the nodes of their trees, and what each gave a row."""

    number: int = 0
    nodes: int = 0
    commits: Counter[int] = field(default_factory=Counter[int])

    def add(self, nodes: int, given: Sequence[int]) -> None:
        """One more, with the numbers of tokens that it gave the rows which go on."""
        self.number += 1
        self.nodes += nodes
        self.commits.update(given)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How often a row got 1, 2, ... tokens."""
        return tuple(self.commits[n] for n in range(1, max(self.commits, default=0) + 1))


class Generating:
    """A generation on its way; iterating over it runs it, a step at a time."""

    def __init__(
        self,
        texts: list[Text],
        limits: Limits,
        draw: Draw,
        reading: Reading,
        trees: Trees | None = None,
        host: HostSpeculation | None = None,
        report: Report | None = None,
        lossless: Lossless = UNCHANGED,
    ) -> None:
        """``reading`` makes the request, once there is something to do, and reads the prompts.

        ``trees`` belong to a model that speculates, and ``host`` proposes to one that verifies. ``lossless`` is
        what is said of the texts. ``begun`` says that reading has begun, and ``calling`` that a call is on its way, or
        was left by an exception: the request may then hold more or less than the texts say. ``request`` is there once
        the prompts are read.
        """
        self.texts, self.limits, self.draw, self.trees, self.host = texts, limits, draw, trees, host
        self.report, self.reading, self.lossless = report, reading, lossless
        read = [text.prompt - held for text, held in zip(texts, reading.held, strict=True)]
        self.statistics = Statistics(sum(read))
        self.request = cast("Request | None", None)
        self._calls = Calls()
        self._closed = self.calling = self.begun = False

    def run(self) -> list[Generated]:
        """Every text to its end."""
        for _ in self:
            pass
        return [self.generated(i) for i in range(len(self.texts))]

    def close(self) -> None:
        """Have no further step run: the request is about to be used for something else."""
        self._closed = True

    def generated(self, row: int) -> Generated:
        """What there is of one text."""
        text = self.texts[row]
        shown = "".join(text.pieces) if text.stream else None
        logprobs = tuple(text.logprobs) if text.logprobs else None
        top = tuple(text.top) if self.report is not None and self.report.top else None
        new = tuple(text.history[text.prompt :])
        return Generated(new, shown, text.finish, self.statistics, logprobs, top, self.lossless)

    def __iter__(self) -> Iterator[None]:
        """Yield whenever the texts that are not finished have new tokens."""
        texts, limits = self.texts, self.limits
        if self._closed:
            return
        if not limits.most:
            for text in texts:
                text.finish = "length"
            return
        start, self.begun, self.calling = time.perf_counter(), True, True
        request, emission = self.reading.read([text.history for text in texts], self._left())
        self.request, read = request, time.perf_counter()
        self._add(emission)
        if self.host is not None:
            assert emission.logits is not None
            prompts = [text.history[: text.prompt] for text in texts]
            first = [text.history[text.prompt] for text in texts]
            self.host.begin(prompts, first, emission.logits[:, -1])
        while True:
            self._note(request, read - start, time.perf_counter() - read)
            self.calling = False
            yield
            if self._closed or all(text.finish for text in texts):
                return
            self.calling = True
            self._step(request)

    def _step(self, request: Request) -> None:
        """One call, and what it gives."""
        if self.host is not None:
            self.draw.step += 1
            histories, limit = [text.history for text in self.texts], request.allowed(self._left())
            found = self.host.step(request, histories, limit, self.draw.processed)
            reported = None if self.report is None else [self.report.of(*row) for row in found.rows]
            given = self._give([tokens for tokens, _ in found.rows], reported)
            self._calls.add(found.nodes, [count for count in given if count])
            return
        live = np.array([not text.finish for text in self.texts])
        token = np.where(live, [text.history[-1] for text in self.texts], 0)[:, None]
        position = np.where(live, [len(text.history) - 1 for text in self.texts], PADDING)[:, None]
        limit = request.allowed(self._left())
        nodes = None if self.trees is None else self.trees.next(limit)
        emission = request.step(token, position, limit=limit, nodes=nodes)
        if self.trees is not None and nodes is not None and emission.count is not None:
            self.trees.observe(nodes, emission.seconds, emission.count, limit)
        self._calls.add(nodes or 1, [given for given in self._add(emission) if given])

    def _add(self, emission: Emission) -> list[int]:
        """Give the texts what a call emits; how many tokens each got."""
        kept = None if self.report is None or emission.logits is None else emission.logits[:, -1].copy()
        tokens = self.draw(self.texts, emission)
        if kept is not None:
            assert self.report is not None
            reported = [self.report.of(row, kept[i : i + 1]) for i, row in enumerate(tokens)]
        elif emission.logprobs is not None:
            reported = [[Likelihood(float(x)) for x in row] for row in emission.logprobs]
        else:
            reported = None
        given = self._give(tokens, reported)
        if self.trees is not None:
            self.trees.sure(emission.confidence, self._left())
        return given

    def _give(
        self, tokens: Sequence[Sequence[int]], reported: Sequence[Sequence[Likelihood]] | None
    ) -> list[int]:
        """Give the texts what follows them, as far as they go on; how many tokens each got."""
        before = [text.new for text in self.texts]
        for row, (text, following) in enumerate(zip(self.texts, tokens, strict=True)):
            if text.finish:
                continue
            for place, token in enumerate(following):
                if text.finish:
                    text.cut += 1
                    continue
                self._take(text, token)
                if reported is not None:
                    text.logprobs.append(reported[row][place].own)
                    text.top.append(reported[row][place].top)
        return [text.new - old for text, old in zip(self.texts, before, strict=True)]

    def _left(self) -> np.ndarray:
        """The most tokens that each text may still have [batch]."""
        return np.array([self.limits.left(text) for text in self.texts], np.int64)

    def _take(self, text: Text, token: int) -> None:
        text.history.append(token)
        ended = token in self.limits.eos
        if text.stream and not ended:
            text.pieces.append(text.stream.add(token))
        context = self.limits.context
        if ended or (text.stream and text.stream.stopped):
            text.finish = "stop"
        elif text.new == self.limits.most or (context is not None and len(text.history) >= context):
            text.finish = "length"
        if text.finish and text.stream:
            text.pieces.append(text.stream.finish())

    def _note(self, request: Request, prefill: float, decode: float) -> None:
        slots = max(request.buffers.slots.values(), default=0)
        self.statistics = Statistics(
            self.statistics.prompt_tokens,
            sum(text.new for text in self.texts),
            prefill,
            decode,
            slots,
            request.buffers.nbytes,
            self._calls.number,
            self._calls.nodes,
            self._calls.lengths,
            0.0 if self.host is None else self.host.drafting,
        )


class Stream(Iterator[Item]):
    """What comes of one text as it comes; nothing runs before the first item is asked for.

    ``generated`` is what there is so far: all of the text and what it took, once the stream has ended.
    """

    def __init__(
        self,
        generating: Generating,
        items: list[Item],
        using: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """``items`` grows as the text is generated; those in it already are not shown.

        ``using`` gives what is held while the text goes on.
        """
        self._generating, self._items, self._using = generating, self._new(items, len(items)), using

    def __next__(self) -> Item:
        with self._using():
            return next(self._items)

    @property
    def generated(self) -> Generated:
        """The text so far."""
        return self._generating.generated(0)

    def _new(self, items: list[Item], shown: int) -> Iterator[Item]:
        for _ in self._generating:
            yield from items[shown:]
            shown = len(items)
