"""Timing engines against each other: one process each, in turns, and a control that rejects bad turns.

Every engine lives in its own process and computes only when it is asked to. A round gives each engine one turn of a
few calls, and the control (the first engine) a turn before and after each. When these two disagree, something else used
the machine, and the turn between them is thrown away. An engine's ratio is to the control's turns beside its own, so a
machine that is slower for a minute changes no ratio.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.worker import Worker, answer_all

CALLS = {
    "session": "benchmarks.timing:session_call",
    "runtime": "benchmarks.timing:runtime_call",
    "concat": "benchmarks.decode:concat_call",
    "step": "benchmarks.decode:step_call",
    "generate": "benchmarks.decode:generate_call",
    "evicting": "benchmarks.kv.speed:evicting_call",
    "stream": "benchmarks.exit:stream_call",
    **dict.fromkeys(
        ("torch", "torch-bf16", "torch-compile", "onnxruntime", "openvino-f32", "openvino-bf16"),
        "benchmarks.peers.vision:call",
    ),
    **dict.fromkeys(
        ("tokopt", "tokopt-avx2", "tokopt-openvino", "tokopt-openvino-bf16"), "benchmarks.peers.vision:call"
    ),
    "transformers": "benchmarks.peers.language:transformers_call",
    "transformers-read": "benchmarks.peers.language:transformers_read",
    "llama.cpp": "benchmarks.peers.language:llama_call",
    "llama.cpp-read": "benchmarks.peers.language:llama_read",
    "genai": "benchmarks.peers.language:genai_call",
    "genai-read": "benchmarks.peers.language:genai_read",
    "openvino-genai": "benchmarks.peers.language:openvino_call",
    "openvino-genai-read": "benchmarks.peers.language:openvino_read",
    "tokopt-read": "benchmarks.peers.language:tokopt_read",
}
"""Kind of engine -> ``module:function`` that makes the call to time; a call that returns seconds says what counts."""

DRIFT = 0.08
"""A turn counts when those of the control beside it differ by less than this."""

PATIENCE = 5
"""An engine gets at most this many turns for each one that has to count."""


@dataclass(frozen=True)
class Engine:
    """What to time: a kind of :data:`CALLS` on an artifact; ``size`` is that of images, or the tokens read before."""

    name: str
    kind: str
    artifact: Path
    batch: int
    size: int
    threads: int


@dataclass(frozen=True)
class Timing:
    """Seconds per call, and the ratios ``control / engine`` over the turns that counted (> 1: faster)."""

    name: str
    minimum: float
    median: float
    ratio_minimum: float
    ratio_median: float
    ratio_quartiles: tuple[float, float]
    rounds: int
    rejected: int


class Disturbed(RuntimeError):
    """Too few turns were free of drift to report a number."""


class Turns:
    """The turns of an engine in its own process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        given = json.dumps({**vars(engine), "artifact": str(engine.artifact)})
        self.worker = Worker(engine.name, "benchmarks.timing", given)
        self.calls = max(1, min(50, round(0.4 / min(self.worker.ask(3)))))

    def turn(self) -> list[float]:
        """Seconds of each call of one turn; a short call is made once before, to bring the caches back."""
        return self.worker.ask(self.calls + 1)[1:] if self.calls > 1 else self.worker.ask(1)

    def close(self) -> None:
        """Have the process end."""
        self.worker.close()


@dataclass
class _Series:
    """The turns of an engine that count, and what the control took beside each."""

    control: list[list[float]] = field(default_factory=list)
    turns: list[list[float]] = field(default_factory=list)
    rejected: int = 0

    def add(self, before: list[float], turn: list[float], after: list[float]) -> None:
        """Keep a turn, or reject it because the control drifted meanwhile."""
        if abs(statistics.median(after) / statistics.median(before) - 1) > DRIFT:
            self.rejected += 1
            return
        self.control.append(before + after)
        self.turns.append(turn)


def compare(engines: Sequence[Engine], rounds: int) -> list[Timing]:
    """Time every engine against the first; raises Disturbed when too many turns of one drifted."""
    series = [_Series() for _ in engines]
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(Turns(engine))) for engine in engines]
        before = workers[0].turn()
        while waiting := [pair for pair in zip(workers, series, strict=True) if len(pair[1].turns) < rounds]:
            for worker, own in waiting:
                turn, after = worker.turn(), workers[0].turn()
                own.add(before, turn, after)
                before = after
                if own.rejected > (PATIENCE - 1) * rounds:
                    raise Disturbed(
                        f"{own.rejected} of {own.rejected + len(own.turns)} turns of {worker.engine.name} drifted "
                        f"by more than {DRIFT:.0%}; run the benchmark on an idle machine"
                    )
    return [_timing(engine.name, own) for engine, own in zip(engines, series, strict=True)]


def _timing(name: str, series: _Series) -> Timing:
    medians = [statistics.median(turn) for turn in series.turns]
    fastest = min(map(min, series.turns))
    ratios = [statistics.median(c) / m for c, m in zip(series.control, medians, strict=True)]
    low, high = np.quantile(ratios, [0.25, 0.75])
    return Timing(
        name,
        fastest,
        statistics.median(medians),
        min(map(min, series.control)) / fastest,
        statistics.median(ratios),
        (float(low), float(high)),
        len(series.turns),
        series.rejected,
    )


def open_session(artifact: Path, threads: int) -> Any:
    """A bare ONNX Runtime session on an artifact's file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    path = artifact / "forward.onnx"
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def session_call(engine: Engine) -> Callable[[], object]:
    """One batch of images, or of texts, through a bare session."""
    session = open_session(engine.artifact, engine.threads)
    names = [given.name for given in session.get_inputs()]
    arrays = _texts(engine) if "input_ids" in names else [_images(engine)]
    feed = dict(zip(names, arrays, strict=True))
    return lambda: session.run(None, feed)


def runtime_call(engine: Engine) -> Callable[[], object]:
    """One batch of images through tokopt's runtime."""
    from tokopt.runtime import load

    model, images = load(engine.artifact, threads=engine.threads), _images(engine)
    return lambda: model(images)


def _images(engine: Engine) -> Any:
    shape = (engine.batch, 3, engine.size, engine.size)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _texts(engine: Engine) -> list[Any]:
    """Token ids, which may be any of BERT's words, and a mask without padding."""
    shape = (engine.batch, engine.size)
    return [np.random.default_rng(0).integers(1000, 30000, shape), np.ones(shape, np.int64)]


def _serve(engine: Engine) -> None:
    """Answer every count with that many timings."""
    module, function = CALLS[engine.kind].split(":")
    call = getattr(import_module(module), function)(engine)

    def timed() -> float:
        start = time.perf_counter()
        own = call()
        return own if isinstance(own, float) else time.perf_counter() - start

    answer_all(lambda count: [timed() for _ in range(count)])


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    _serve(Engine(**{**given, "artifact": Path(given["artifact"])}))
