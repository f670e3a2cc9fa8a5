"""What a call with several new tokens costs: ``python -m benchmarks.rows``.

SmolLM2-135M with the weights of its file (``keep_grid``), by every instruction set of tokopt's CPU kernels that the
machine has, by ONNX Runtime's own kernels, and by llama.cpp where it is installed (extra ``peers``); beside them, what
summing as many bytes takes as a call must read. Every engine has its own process and they take turns; a turn times all
numbers of rows. Finished parts are kept, so a run that was cut off goes on where it was. Writes ``rows.json``,
``rows.md`` and ``rows.png`` in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.progress import Progress, write_report
from benchmarks.worker import Worker, answer_all, medians
from examples.data import cache_folder, smollm2_gguf, write_atomically
from tokopt.kernels import cpu

RESULTS = Path(__file__).parent / "results"
MODEL = "SmolLM2-135M-Instruct"
METHODS = ("keep_grid", "keep_grid, 8-bit cache")
PROMPTS = (64, 1024)
ROWS = (1, 2, 4, 8, 16, 32)

LLAMA, NONE, READ = "llama.cpp", "ONNX Runtime's own", "reading the bytes"

Measure = Callable[[], Mapping[int, float]]
"""One turn: the seconds of a call by its number of new tokens."""


@dataclass(frozen=True)
class Engine:
    """A process to time: ``name`` is an instruction set of the CPU kernels, NONE, LLAMA or READ."""

    name: str
    artifact: str
    prompt: int
    threads: int


def worker(engine: Engine) -> Worker:
    """An engine in its own process, which answers with one turn."""
    forced = {"TOKOPT_ISA": engine.name} if engine.name in cpu.isas() else {}
    serving = ("--serve", json.dumps(asdict(engine)))
    return Worker(engine.name, "benchmarks.rows", *serving, environment={**os.environ, **forced})


def serve(engine: Engine) -> None:
    """Answer with a turn."""
    measure = {LLAMA: llama, READ: reading}.get(engine.name, artifact)(engine)
    answer_all(lambda _: dict(measure()))


def artifact(engine: Engine) -> Measure:
    """A turn of tokopt's runtime."""
    from tokopt.runtime import LanguageModel, load
    from tokopt.runtime.rows import RowTimer

    model = load(engine.artifact, threads=engine.threads, kernels=engine.name != NONE, verify=False)
    assert isinstance(model, LanguageModel)
    return RowTimer(model, ROWS, engine.prompt).measure


def llama(engine: Engine) -> Measure:
    """A turn of llama.cpp, which gives the logits of every new token, too."""
    from benchmarks import timing
    from benchmarks.peers.language import llama_model

    slots = engine.prompt + max(ROWS)
    given = timing.Engine(LLAMA, "llama.cpp", Path(engine.artifact), 1, slots, engine.threads)
    model = llama_model(given, logits_all=True)
    model.eval((np.arange(engine.prompt) % 49152).tolist())

    def call(rows: int) -> float:
        model.n_tokens = engine.prompt
        clock = time.perf_counter()
        model.eval([0] * rows)
        return time.perf_counter() - clock

    def measure() -> Mapping[int, float]:
        call(max(ROWS))
        return {rows: (call(rows), call(rows))[1] for rows in ROWS}

    return measure


def reading(engine: Engine) -> Measure:
    """A turn that sums as many bytes as a call must read: all weights, and the slots of the cache in use."""
    import torch

    from tokopt.runtime import LanguageModel, load

    torch.set_num_threads(engine.threads)
    model = load(engine.artifact, threads=1, verify=False)
    assert isinstance(model, LanguageModel)
    buffers = model.open(1, engine.prompt + max(ROWS)).buffers
    weights = (Path(engine.artifact) / "weights.data").stat().st_size

    def held(rows: int) -> int:
        return buffers.bytes_for(dict.fromkeys(buffers.slots, engine.prompt + rows))

    memory = torch.zeros((weights + held(max(ROWS))) // 4)

    def call(rows: int) -> float:
        needed = memory[: (weights + held(rows)) // 4]
        clock = time.perf_counter()
        needed.sum()
        return time.perf_counter() - clock

    def measure() -> Mapping[int, float]:
        call(max(ROWS))
        return {rows: call(rows) for rows in ROWS}

    return measure


def engines(method: str, prompt: int, threads: int) -> list[Engine]:
    """What is timed on one artifact; llama.cpp reads the file that it was made of."""
    from benchmarks.quantize import artifact

    artifact(MODEL, "float32")  # which others are calibrated on
    path = str(artifact(MODEL, method))
    names = [name for name in cpu.isas() if name != "plain"]
    made = [Engine(name, path, prompt, threads) for name in [READ, NONE, *names]]
    if find_spec("llama_cpp") and method == METHODS[0]:
        made.insert(0, Engine(LLAMA, str(smollm2_gguf()), prompt, threads))
    return made


# --- report -----------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """A table for each artifact and prompt."""
    lines = [f"# What several tokens at once cost: {MODEL}", ""]
    lines += [
        "Milliseconds of a call by its new tokens, and the ratio to one; every new token's logits are computed."
    ]
    lines += ["Instruction sets are forced with `TOKOPT_ISA`; `amx_int8` is `avx512_vnni` for few rows.", ""]
    lines += ["![Milliseconds and ratios by the number of new tokens](rows.png)", ""]
    for title, found in parts(report):
        lines += [f"## {title}", "", "| engine | " + " | ".join(map(str, ROWS)) + " |", "|---" * 7 + "|"]
        for name, seconds in found.items():
            cells = [f"{1e3 * own:.1f} ({own / seconds['1']:.2f})" for own in seconds.values()]
            lines.append(f"| {label(name)} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, "```json", json.dumps(report["machine"], indent=1), "```", ""])


def parts(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Mapping[str, float]]]]:
    """Title and times of every table that was measured."""
    return [
        (f"`{method}`, after {prompt} tokens", report[f"{method}/{prompt}"])
        for method in METHODS
        for prompt in PROMPTS
        if f"{method}/{prompt}" in report
    ]


def label(name: str) -> str:
    """An engine's name in a table."""
    return name if name in (LLAMA, READ) else f"tokopt, {name}" if name == NONE else f"tokopt, `{name}`"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """The first artifact's curves: milliseconds, and ratios to one row."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(PROMPTS), figsize=(11, 7), sharex=True, constrained_layout=True)
    for column, (title, found) in enumerate(parts(report)[: len(PROMPTS)]):
        for name, seconds in found.items():
            times = np.array(list(seconds.values()))
            style = ":" if name == READ else "--" if name in (LLAMA, NONE) else "-"
            axes[0, column].plot(ROWS, 1e3 * times, style, marker="o", label=name)
            axes[1, column].plot(ROWS, times / times[0], style, marker="o", label=name)
        axes[0, column].set_title(title.replace("`", ""))
        axes[1, column].set_xlabel("new tokens in a call")
    axes[0, 0].set_ylabel("milliseconds")
    axes[1, 0].set_ylabel("calls with one token")
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ROWS, map(str, ROWS))
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    axes[0, 0].legend()
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=METHODS, help="one artifact")
    parser.add_argument("--serve", metavar="ENGINE", help="be the process of one engine (JSON)")
    options = parser.parse_args()
    if options.serve:
        serve(Engine(**json.loads(options.serve)))
        return
    folder = cache_folder() / "benchmark-rows"
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder)
    for method in METHODS if options.only is None else (options.only,):
        for prompt in PROMPTS:
            print(f"{method}, after {prompt} tokens", file=sys.stderr, flush=True)
            made = [partial(worker, one) for one in engines(method, prompt, options.threads)]
            progress.once(f"{method}/{prompt}", lambda own=made: medians(own, options.rounds))
    report = json.loads(json.dumps({"machine": describe(options.threads), **progress.values}))
    text = markdown(report)
    write_report(RESULTS, "rows", report, text)
    write_atomically(RESULTS / "rows.png", lambda path: draw(report, path))
    print(text)


if __name__ == "__main__":
    main()
