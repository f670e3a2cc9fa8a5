"""Speculation on real prompts: ``python -m benchmarks.speculate``.

SmolLM2-135M with the weights of its file (``keep_grid``), with three drafters and without speculation: completing code
of Python's library, summarising and quoting its documentation, and chat, greedily and at temperature 0.7. Beside them
llama.cpp without speculation and with its lookup in the prompt, where it is installed (extra ``peers``), on the same
file. Every engine has its own process, and for each prompt they take turns. Finished parts are kept, so a run that was
cut off goes on where it was. Writes ``speculate.json``, ``speculate.md``, ``speculate.png`` and
``speculate-lengths.png`` in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kv.quality import documentation
from benchmarks.machine import describe
from benchmarks.progress import Progress
from examples.data import cache_folder, smollm2, smollm2_gguf, write_atomically

RESULTS = Path(__file__).parent / "results"

ENGINES: Mapping[str, str] = {
    "without": "keep_grid",
    "token_recycling": "keep_grid,speculate{drafter=token_recycling}",
    "prompt_lookup": "keep_grid,speculate",
    "hybrid": "keep_grid,speculate{drafter=hybrid}",
}
"""Name in the tables -> pipeline; the first is what the others are compared with."""

PEERS: tuple[str, ...] = ("llama.cpp", "llama.cpp with lookup") if find_spec("llama_cpp") else ()
"""Timed greedily alone: their random numbers are others."""

SOURCES = ("textwrap", "heapq", "bisect", "fnmatch", "shlex", "string", "calendar", "csv")
QUESTIONS = (
    "Explain what a hash table is and when to use one.",
    "Write a short story about a lighthouse keeper.",
    "What are the main differences between cats and dogs?",
    "Give me a recipe for pancakes with quantities.",
    "How does photosynthesis work?",
    "List ten capital cities with their countries.",
    "Write a polite e-mail that asks for a day off.",
    "Explain how a bicycle stays upright.",
)
KINDS = ("code", "summary", "quote", "chat")
NEW, SHOWN, TEMPERATURES = 128, 160, (0.0, 0.7)
"""New tokens; tokens of a source or document that a prompt shows; temperatures."""


def prompts(model: Any) -> dict[str, list[list[int]]]:
    """Token ids of eight prompts of each kind."""
    encode = model.tokenizer.encode
    sources = [encode(inspect.getsource(import_module(name))) for name in SOURCES]
    found = [text for text in documentation().split("\n\n") if len(text) > 500]
    texts = [
        model.tokenizer.decode(encode(found[i])[:SHOWN])
        for i in np.linspace(0, len(found) - 1, 8).astype(int)
    ]

    def asked(question: str) -> list[int]:
        return model.chat_prompt([{"role": "user", "content": question}])

    return {
        "code": [ids[len(ids) // 2 : len(ids) // 2 + 2 * SHOWN] for ids in sources],
        "summary": [asked(f"Summarise this text:\n\n{text}") for text in texts],
        "quote": [asked(f"Repeat this text word for word:\n\n{text}") for text in texts],
        "chat": [asked(question) for question in QUESTIONS],
    }


class Worker:
    """An engine in its own process, which answers a prompt with what its text took."""

    def __init__(self, name: str, threads: int) -> None:
        path = smollm2_gguf() if name in PEERS else artifact(name)
        command = [
            sys.executable,
            "-m",
            "benchmarks.speculate",
            "--serve",
            name,
            path,
            "--threads",
            str(threads),
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def generate(self, ids: list[int], temperature: float) -> dict[str, Any]:
        """Seconds and calls of decoding, and the tokens."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([ids, temperature]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"an engine ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)


Answer = Callable[[list[int], float], dict[str, Any]]
"""Token ids of a prompt and a temperature -> seconds of decoding, and the new tokens."""


def serve(name: str, path: str, threads: int) -> None:
    """Answer every line on stdin; what an engine remembers of texts is empty at the start of each."""
    answer = (llama if name in PEERS else tokopt_model)(name, path, threads)
    for line in sys.stdin:
        ids, temperature = json.loads(line)
        print(json.dumps(answer(ids, temperature)), flush=True)


def tokopt_model(name: str, path: str, threads: int) -> Answer:
    """An artifact; it also says how many tokens its calls committed."""
    from tokopt.runtime import LanguageModel, Sampling, load

    model = load(path, threads=threads, verify=False)
    assert isinstance(model, LanguageModel)

    def answer(ids: list[int], temperature: float) -> dict[str, Any]:
        done = model.generate(ids, max_tokens=NEW, sampling=Sampling(temperature=temperature, seed=1))
        took = done.statistics
        return {
            "seconds": took.decode_seconds,
            "calls": took.decode_calls,
            "commits": took.commits,
            "tokens": list(done.tokens),
        }

    return answer


def llama(name: str, path: str, threads: int) -> Answer:
    """llama.cpp by its package for Python, whose lookup proposes ten tokens."""
    from benchmarks import timing
    from benchmarks.peers.language import _llama

    options: dict[str, Any] = {}
    if name != PEERS[0]:
        speculative: Any = import_module("llama_cpp.llama_speculative")
        options = {"draft_model": speculative.LlamaPromptLookupDecoding(), "logits_all": True}
    model = _llama(timing.Engine(name, "llama.cpp", Path(path), 1, 2048, threads), **options)
    stops = {model.token_eos(), *model.tokenize(b"<|im_end|>", add_bos=False, special=True)}

    def answer(ids: list[int], temperature: float) -> dict[str, Any]:
        tokens: list[int] = []
        start = 0.0
        for token in model.generate(ids, temp=temperature, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0):
            start = start or time.perf_counter()
            tokens.append(token)
            if len(tokens) == NEW or token in stops:
                break
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    return answer


def artifact(name: str) -> Path:
    """The artifact of an engine, built once in a process of its own."""
    folder = cache_folder() / "benchmark-speculate"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.tokopt"
    if not path.exists():
        command = [sys.executable, "-m", "benchmarks.speculate", "--build", ENGINES[name], path]
        subprocess.run(command, check=True)
    return path


def build(pipeline: str, path: str) -> None:
    """Capture, optimize and export."""
    import tokopt

    tokopt.export(tokopt.optimize(tokopt.capture_lm(smollm2()), pipeline), path)


def measure(kind: str, texts: list[list[int]], temperature: float, threads: int) -> dict[str, list[Any]]:
    """What every engine took for each of the prompts."""
    found: dict[str, list[Any]] = {name: [] for name in (*ENGINES, *(() if temperature else PEERS))}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(closing(Worker(name, threads))) for name in found}
        for worker in workers.values():
            worker.generate(texts[0], temperature)  # the first allocates
        for ids in texts:
            for name, worker in workers.items():
                found[name].append(worker.generate(ids, temperature))
    return found


# --- report -----------------------------------------------------------------------------------------------


def speeds(found: Mapping[str, list[Any]], name: str) -> list[float]:
    """Tokens per second over those of the first engine, prompt by prompt; a text's first token is the prompt's."""
    base = next(iter(found.values()))
    return [
        ((len(own["tokens"]) - 1) / own["seconds"]) / ((len(plain["tokens"]) - 1) / plain["seconds"])
        for own, plain in zip(found[name], base, strict=True)
        if len(own["tokens"]) > 1
    ]


def per_call(found: Mapping[str, list[Any]], name: str) -> float:
    """Tokens that a call commits, over all prompts; the first token of a text is the prompt's."""
    tokens = sum(len(own["tokens"]) - 1 for own in found[name])
    return tokens / max(sum(own["calls"] for own in found[name]), 1)


def agreement(found: Mapping[str, list[Any]], name: str) -> str:
    """On how many prompts the text is the one without speculation."""
    base = next(iter(found.values()))
    same = sum(own["tokens"] == plain["tokens"] for own, plain in zip(found[name], base, strict=True))
    return f"{same} of {len(base)}"


def markdown(report: Mapping[str, Any]) -> str:
    """A table for each temperature."""
    lines = ["# Speculation: SmolLM2-135M-Instruct, `keep_grid`", ""]
    lines += [
        f"{NEW} new tokens after each of eight prompts of a kind. Speed: tokens/s of decoding over that of the "
        "artifact without speculation, the median over prompts (the slowest); then tokens that a call commits, and on "
        "how many prompts the text is the same: the artifact without speculation rounds attention in another order, "
        "so that near ties go another way.",
        "",
        "![Speed by drafter and kind of prompt](speculate.png)",
        "",
        "How many tokens calls commit, greedily, as shares of all calls:",
        "",
        "![Tokens per call by drafter and kind of prompt](speculate-lengths.png)",
        "",
    ]
    for temperature in TEMPERATURES:
        lines += [f"## Temperature {temperature:g}", ""]
        lines += ["| drafter | " + " | ".join(KINDS) + " | all |", "|---" * (len(KINDS) + 2) + "|"]
        for name in list(report[f"{KINDS[0]}/{temperature}"])[1:]:
            cells = []
            for kind in KINDS:
                found = report[f"{kind}/{temperature}"]
                ratios, same = speeds(found, name), agreement(found, name)
                said = "" if name in PEERS else f", {per_call(found, name):.2f}, {same}"
                cells.append(f"{np.median(ratios):.2f} ({min(ratios):.2f}){said}")
            every = [r for kind in KINDS for r in speeds(report[f"{kind}/{temperature}"], name)]
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {np.mean(every):.2f} |")
        plain = [own for kind in KINDS for own in report[f"{kind}/{temperature}"]["without"]]
        rate = sum(len(own["tokens"]) for own in plain) / sum(own["seconds"] for own in plain)
        lines += ["", f"Without: {rate:.1f} tokens/s.", ""]
    return "\n".join([*lines, "```json", json.dumps(report["machine"], indent=1), "```", ""])


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Bars of the median speeds."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(TEMPERATURES), figsize=(11, 4), sharey=True, constrained_layout=True
    )
    names = list(ENGINES)[1:]
    for axis, temperature in zip(axes, TEMPERATURES, strict=True):
        for place, name in enumerate(names):
            heights = [np.median(speeds(report[f"{kind}/{temperature}"], name)) for kind in KINDS]
            axis.bar(np.arange(len(KINDS)) + 0.27 * (place - 1), heights, 0.25, label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(KINDS)), KINDS)
        axis.set_title(f"temperature {temperature:g}")
    axes[0].set_ylabel("speed over decoding without")
    axes[0].legend()
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def draw_lengths(report: Mapping[str, Any], path: Path) -> None:
    """Histograms of the tokens that a greedy call commits."""
    from matplotlib import pyplot

    names = list(ENGINES)[1:]
    figure, grid = pyplot.subplots(
        len(names), len(KINDS), figsize=(11, 6), sharex=True, sharey=True, constrained_layout=True
    )
    for row, name in zip(grid, names, strict=True):
        for axis, kind in zip(row, KINDS, strict=True):
            texts = [own["commits"] for own in report[f"{kind}/{TEMPERATURES[0]}"][name]]
            longest = max(map(len, texts))
            total = np.sum([np.pad(counts, (0, longest - len(counts))) for counts in texts], axis=0)
            axis.bar(np.arange(1, longest + 1), total / total.sum())
        row[0].set_ylabel(name)
    for axis, kind in zip(grid[0], KINDS, strict=True):
        axis.set_title(kind)
    for axis in grid[-1]:
        axis.set_xlabel("tokens of a call")
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculate", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--serve", nargs=2, metavar=("NAME", "FILE"), help="be the process of one engine")
    parser.add_argument(
        "--build", nargs=2, metavar=("PIPELINE", "ARTIFACT"), help="write one engine's artifact"
    )
    options = parser.parse_args()
    if options.serve:
        name, file = options.serve
        serve(name, file, options.threads)
        return
    if options.build:
        pipeline, file = options.build
        build(pipeline, file)
        return
    from tokopt.runtime import load

    folder = cache_folder() / "benchmark-speculate"
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder)
    given = prompts(load(artifact("without"), verify=False))
    for temperature in TEMPERATURES:
        for kind in KINDS:
            print(f"{kind}, temperature {temperature:g}", file=sys.stderr, flush=True)
            texts = given[kind]
            progress.once(
                f"{kind}/{temperature}",
                lambda k=kind, t=texts, c=temperature: measure(k, t, c, options.threads),
            )
    report = {"machine": describe(options.threads), **progress.values}
    text = markdown(report)
    write_atomically(RESULTS / "speculate.json", lambda path: path.write_text(json.dumps(report) + "\n"))
    write_atomically(RESULTS / "speculate.md", lambda path: path.write_text(text))
    write_atomically(RESULTS / "speculate.png", lambda path: draw(report, path))
    write_atomically(RESULTS / "speculate-lengths.png", lambda path: draw_lengths(report, path))
    print(text)


if __name__ == "__main__":
    main()
