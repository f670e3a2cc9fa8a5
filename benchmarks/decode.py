"""Decoding one token at a time: tokopt's cache, written in place, against the plain export that concatenates.

``python -m benchmarks.decode`` exports SmolLM2-135M twice: with tokopt, and with ``torch.onnx.export`` at opset 23
from the same model with a cache that is concatenated and fed back as inputs and outputs. It times the tokens after
prompts of several lengths, and tokopt's whole generation loop against its bare step, and writes
``benchmarks/results/decode.json`` and ``decode.md``.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.progress import write_report
from benchmarks.timing import Engine, Timing, compare
from examples.data import cache_folder, smollm2, write_atomically

RESULTS = Path(__file__).parent / "results"
TOKENS = 8
"""Tokens decoded in one timed call; each begins again at the end of the prompt."""

PROMPTS = (64, 1024)


def build(folder: Path) -> None:
    """Both exports, once."""
    import tokopt

    if not (folder / "tokopt").exists():
        tokopt.export(tokopt.capture_lm(smollm2()), folder / "tokopt")
    if not (folder / "concat").exists():
        write_atomically(folder / "concat", export_concat)


def export_concat(folder: Path) -> None:
    """The plain export: tokens, positions and the past in; logits of the last token and the longer past out."""
    import torch
    from torch import Tensor, nn
    from transformers import AutoModelForCausalLM

    from tokopt.frontend.hugging_face import HuggingFace
    from tokopt.frontend.sight import Sight

    class Concatenated:
        def __init__(self, past: tuple[Tensor, ...]) -> None:
            self.past = list(past)

        def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            for at, new in ((2 * layer, keys), (2 * layer + 1, values)):
                self.past[at] = torch.cat([self.past[at], new], dim=2)
            return self.past[2 * layer], self.past[2 * layer + 1]

    class Plain(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.decoder = HuggingFace(model)

        def forward(self, tokens: Tensor, positions: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
            count, before = tokens.shape[1], past[0].shape[2]
            seen = torch.arange(before + count) <= torch.arange(count)[:, None] + before
            cache: Any = Concatenated(past)
            masks = {Sight(): seen[None, None].expand(tokens.shape[0], -1, -1, -1)}
            logits = self.decoder(tokens, positions, masks, cache, torch.tensor([-1]))
            return (logits, *cache.past)

    model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    config = model.config
    channels = config.hidden_size // config.num_attention_heads
    past = [
        torch.randn(2, config.num_key_value_heads, 7, channels) for _ in range(2 * config.num_hidden_layers)
    ]
    example = (torch.zeros(2, 3, dtype=torch.int64), torch.arange(7, 10).repeat(2, 1), *past)
    batch, tokens, before = (torch.export.Dim(name) for name in ("batch", "tokens", "past"))
    shapes = ({0: batch, 1: tokens}, {0: batch, 1: tokens}, tuple({0: batch, 2: before} for _ in past))
    folder.mkdir()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad():
        program = torch.onnx.export(
            Plain(model.eval()), example, dynamic_shapes=shapes, opset_version=23, dynamo=True, verbose=False
        )
    assert program is not None
    program.save(folder / "step.onnx", external_data=True)


# --- what is timed --------------------------------------------------------------------------------------------


def concat_call(engine: Engine) -> Callable[[], object]:
    """Tokens after a prompt, the past fed back as it comes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = engine.threads, 1
    session = onnxruntime.InferenceSession(
        str(engine.artifact / "step.onnx"), options, providers=["CPUExecutionProvider"]
    )
    names = [given.name for given in session.get_inputs()]
    empty = [
        np.zeros((engine.batch, *given.shape[1:2], 0, given.shape[3]), np.float32)
        for given in session.get_inputs()[2:]
    ]

    def step(tokens: np.ndarray, start: int, past: list[Any]) -> tuple[int, list[Any]]:
        positions = np.arange(start, start + tokens.shape[1])[None]
        logits, *after = session.run(None, dict(zip(names, (tokens, positions, *past), strict=True)))
        return int(np.asarray(logits)[0, -1].argmax()), after

    first, prompt = step(_prompt(engine), 0, empty)

    def call() -> None:
        token, past = first, prompt
        for i in range(TOKENS):
            token, past = step(np.array([[token]]), engine.size + i, past)

    return call


def step_call(engine: Engine) -> Callable[[], object]:
    """The same through tokopt's step and nothing around it."""
    session, first = _prefilled(engine)
    length = _length(session)
    value, used = session.buffers.values[length], dict(session.used)

    def call() -> None:
        token = first
        session.buffers.values[length], session.used = _copy(session, value), dict(used)
        session.program.bind()
        for i in range(TOKENS):
            logits = session.step(np.array([[token]]), np.array([[engine.size + i]])).logits
            token = int(logits[0, -1].argmax())

    return call


def generate_call(engine: Engine) -> Callable[[], object]:
    """The same through the whole loop: sampling, stop tokens, statistics."""
    from tokopt.runtime import loop
    from tokopt.runtime.language import Options

    model = _load(engine)
    session, _ = _prefilled(engine)
    length = _length(session)
    value, used = session.buffers.values[length], dict(session.used)
    last = session.step(np.array([[0]]), np.array([[engine.size]])).logits.copy()

    class Prefilled(loop.Request):
        def __init__(self) -> None:
            self.__dict__.update(session.__dict__)
            self.buffers.values[length], self.used = _copy(session, value), dict(used)
            self.program.bind()

        def prefill(self, prompts: object, limit: object = None) -> loop.Emission:
            return loop.Emission(last)

    model._request = lambda *arguments: Prefilled()
    ids = _prompt(engine)[0].tolist()

    def call() -> None:
        generating = model._generating([ids], (), Options(max_tokens=TOKENS + 1))
        generating.texts[0].stream = None
        generating.run()

    return call


def _load(engine: Engine) -> Any:
    from tokopt.runtime import load

    return load(engine.artifact, threads=engine.threads)


def _prefilled(engine: Engine) -> tuple[Any, int]:
    session = _load(engine).open(engine.batch, engine.size + TOKENS + 1)
    return session, int(session.prefill(_prompt(engine).tolist()).logits[0, -1].argmax())


def _length(session: Any) -> str:
    """The name of the state that counts the slots in use."""
    return next(name for name, state in session.buffers.states.items() if state.kind == "length")


def _copy(session: Any, value: Any) -> Any:
    return session.buffers._value(value.numpy().copy())


def _prompt(engine: Engine) -> np.ndarray:
    return np.random.default_rng(0).integers(100, 40_000, (engine.batch, engine.size))


# --- the report -----------------------------------------------------------------------------------------------


def measure(folder: Path, prompt: int, threads: int, rounds: int) -> list[Timing]:
    """The plain export, tokopt's step, and tokopt's loop, in turns."""
    kinds = {"concat": "concat", "step": "tokopt", "generate": "tokopt"}
    engines = [Engine(kind, kind, folder / where, 1, prompt, threads) for kind, where in kinds.items()]
    return compare(engines, rounds)


def markdown(report: dict[str, Any]) -> str:
    lines = ["# SmolLM2-135M, float32, ONNX Runtime CPU: decoding", ""]
    lines += [
        "| prompt | engine | tokens/s | ratio to the plain export | quartiles |",
        "|---|---|---|---|---|",
    ]
    words = {
        "concat": "plain opset-23 export, cache concatenated",
        "step": "tokopt's step, cache in place",
        "generate": "tokopt's generation loop",
    }
    for prompt, timings in report["prompts"].items():
        for t in timings:
            low, high = t["ratio_quartiles"]
            speed = TOKENS / t["median"]
            lines.append(
                f"| {prompt} | {words[t['name']]} | {speed:.1f} | {t['ratio_median']:.2f} | {low:.2f} to {high:.2f} |"
            )
    lines += ["", "```json", json.dumps(report["machine"], indent=1), "```", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    folder = cache_folder() / "benchmark-decode"
    folder.mkdir(parents=True, exist_ok=True)
    build(folder)
    timings = {p: [asdict(t) for t in measure(folder, p, options.threads, options.rounds)] for p in PROMPTS}
    report = {"machine": describe(options.threads), "prompts": timings}
    RESULTS.mkdir(exist_ok=True)
    write_report(RESULTS, "decode", report, markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
