"""What eviction saves: time per token, evictions included, and bytes of cache, at contexts of several lengths.

What is in a cache does not change what a step costs, so caches are filled with random keys and values instead of
reading thousands of tokens; every engine then decodes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.kv.policies import EVERY, artifact
from benchmarks.timing import Engine, compare

CONTEXTS = (1024, 4096, 8000)
"""Tokens in the full cache; SmolLM2 knows 8192 positions."""


def measure(
    model: str, policies: Sequence[str], context: int, threads: int, rounds: int
) -> list[dict[str, Any]]:
    """Timings of the full cache and the policies, in turns; one call decodes as many tokens as one eviction serves."""
    engines = [
        Engine(policy, "evicting", artifact(model, policy), 1, context, threads)
        for policy in ("full", *policies)
    ]
    timings = [asdict(timing) for timing in compare(engines, rounds)]
    for timing, engine in zip(timings, engines, strict=True):
        timing["bytes"] = filled(engine)[0].buffers.nbytes
    return timings


def evicting_call(engine: Engine) -> Callable[[], object]:
    """Decode the tokens from one eviction to the next."""
    session, position = filled(engine)
    length, used = session.buffers.read("length"), dict(session.used)

    def call() -> None:
        if not session.schedule.triggers:  # a full cache begins again at the same length
            session.buffers.values["length"], session.used = session.buffers._value(length.copy()), dict(used)
            session.program.bind()
        for i in range(EVERY):
            session.step(np.array([[100 + i]]), np.array([[position + i]]))

    return call


def filled(engine: Engine) -> tuple[Any, int]:
    """A session that holds ``engine.size`` tokens less those that the policy evicts, and the next position."""
    from tokopt.runtime import load

    model: Any = load(engine.artifact, threads=engine.threads)
    session = model.open(engine.batch, engine.size + EVERY)
    buffers, generator = session.buffers, np.random.default_rng(0)
    for name, value in buffers.values.items():
        array, kind = value.numpy(), buffers.states[name].kind
        if kind in ("key", "value") and array.dtype == np.float32:
            array[:] = generator.standard_normal(array.shape, np.float32)
        elif kind == "position":
            array[:, :, : engine.size, 0] = np.arange(engine.size)
        elif kind == "length":
            array[:] = engine.size
    session.used = dict.fromkeys(session.used, engine.size)
    session.after_prompt()
    return session, engine.size
