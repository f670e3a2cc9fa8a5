"""Decoding with speculation against decoding without: ``python -m benchmarks.speculate``.

SmolLM2-135M with the weights of its file (``keep_grid``), with the drafters of the program and those of the host, and
without speculation: completing code of Python's library, summarising and quoting its documentation, and chat, greedily
and at temperature 0.7. Beside them, greedily alone, the engines of :mod:`benchmarks.peers.writing` that are installed
(extra ``peers``), two of them with and without a lookup in the prompt. What the outputs cost that ``verify`` adds for
its host is measured apart. Every engine has its own process, and for each prompt they take turns. Finished parts are
kept, so a run that was cut off goes on where it was. Writes ``speculate.json``, ``speculate.md``, ``speculate.png`` and
``speculate-lengths.png`` in ``benchmarks/results``, or in ``--results``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kv.quality import documentation
from benchmarks.machine import describe
from benchmarks.peers import writing
from benchmarks.progress import Progress
from benchmarks.worker import Worker, answer_all
from examples.data import cache_folder, smollm2, write_atomically

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Method:
    """The pipeline of an artifact, and what its host drafts with, if it does."""

    pipeline: str
    drafter: str | None = None


ENGINES: Mapping[str, Method] = {
    "without": Method("keep_grid"),
    "prompt_lookup": Method("keep_grid,speculate"),
    "token_recycling": Method("keep_grid,speculate{drafter=token_recycling}"),
    "hybrid": Method("keep_grid,speculate{drafter=hybrid}"),
    "logitspec": Method("keep_grid,speculate{drafter=logitspec}"),
    "suffix of the host": Method("keep_grid,verify", "suffix"),
    "hybrid of the host": Method("keep_grid,verify", "hybrid"),
    "logitspec of the host": Method("keep_grid,verify", "logitspec"),
}
"""Name in the tables -> method; the first is what the others are compared with."""

HANDED: Mapping[str, Method] = {
    "keep_grid": Method("keep_grid"),
    "keep_grid,verify{neighbours=16}": Method("keep_grid,verify{neighbours=16}"),
    "keep_grid,h2o": Method("keep_grid,h2o{budget=256}"),
    "keep_grid,h2o,verify": Method("keep_grid,h2o{budget=256},verify"),
}
"""The same without a drafter: an artifact that hands nothing to its host, and one that does, in turns."""

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
NEW, PROMPTS, SHOWN, TEMPERATURES = 128, 8, 160, (0.0, 0.7)
"""New tokens; prompts of a kind; tokens of a source or document that a prompt shows; temperatures."""


def prompts(model: Any) -> dict[str, list[list[int]]]:
    """Token ids of up to eight prompts of each kind."""
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


def worker(name: str, threads: int) -> Worker:
    """An engine in its own process; asked for a text (ids, temperature, tokens) it says what that took."""
    return Worker(name, "benchmarks.speculate", "--serve", name, "--threads", str(threads))


Answer = Callable[[list[int], float, int], dict[str, Any]]
"""Token ids of a prompt, a temperature and the most new tokens -> seconds of decoding, and the new tokens."""


def serve(name: str, threads: int) -> None:
    """Answer with texts; what an engine remembers of them is empty at the start of each."""
    answer = peer(name, threads) if name in writing.PEERS else tokopt_model(named(name), threads)
    answer_all(lambda question: answer(*question))


def named(name: str) -> Method:
    """The method of an engine."""
    return {**HANDED, **ENGINES}[name]


def tokopt_model(method: Method, threads: int) -> Answer:
    """An artifact; it also says how many tokens its calls committed."""
    from tokopt.runtime import LanguageModel, Sampling, load

    model = load(artifact(method.pipeline), threads=threads, verify=False)
    assert isinstance(model, LanguageModel)

    def answer(ids: list[int], temperature: float, tokens: int) -> dict[str, Any]:
        sampling = Sampling(temperature=temperature, seed=1)
        done = model.generate(ids, max_tokens=tokens, sampling=sampling, drafter=method.drafter)
        took = done.statistics
        return {
            "seconds": took.decode_seconds,
            "calls": took.decode_calls,
            "commits": took.commits,
            "tokens": list(done.tokens),
        }

    return answer


def peer(name: str, threads: int) -> Answer:
    """Another engine, greedily."""
    written = writing.open_peer(name, writing.folder(), threads)
    return lambda ids, temperature, tokens: written(ids, tokens)


def artifact(pipeline: str) -> Path:
    """The artifact of a pipeline, built once in a process of its own."""
    folder = cache_folder() / "benchmark-speculate"
    folder.mkdir(exist_ok=True)
    path = folder / f"{re.sub(r'[^a-z0-9_]+', '-', pipeline).strip('-')}.tokopt"
    if not path.exists():
        print(f"building {pipeline}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks.speculate", "--build", pipeline, path]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def build(pipeline: str, path: str) -> None:
    """Capture, optimize and export."""
    import tokopt

    tokopt.export(tokopt.optimize(tokopt.capture_lm(smollm2()), pipeline), path)


def prepare() -> None:
    """What engines read, so that none builds it while others are timed."""
    for method in (*ENGINES.values(), *HANDED.values()):
        artifact(method.pipeline)
    if writing.installed():
        writing.folder()


def startable(names: Sequence[str], threads: int) -> dict[str, str]:
    """Why an engine does not write, by name; empty for one that does."""
    found: dict[str, str] = {}
    for name in names:
        with closing(worker(name, threads)) as own:
            try:
                own.ask([[1, 2, 3], 0.0, 2])
                found[name] = ""
            except RuntimeError as error:
                found[name] = str(error)
    return found


def measure(
    engines: Sequence[str], texts: list[list[int]], temperature: float, tokens: int, threads: int
) -> dict[str, list[Any]]:
    """What every engine took for each of the prompts."""
    found: dict[str, list[Any]] = {name: [] for name in engines}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(closing(worker(name, threads))) for name in found}
        for name, own in workers.items():  # the first allocates, and tells tokopt how many nodes pay
            own.ask([texts[0], temperature, 2 if name in writing.PEERS else tokens])
        for ids in texts:
            for name, own in workers.items():
                found[name].append(own.ask([ids, temperature, tokens]))
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
    """A table for each temperature, and one of what handing costs."""
    first = report[f"{KINDS[0]}/{TEMPERATURES[0]}"]["without"]
    lines = ["# Speculation: SmolLM2-135M-Instruct, `keep_grid`", ""]
    lines += [
        f"{report['tokens']} new tokens after each of {len(first)} prompts of a kind. Speed: tokens/s of decoding over "
        "that of the artifact without speculation, the median over prompts (the slowest); then tokens that a call "
        "commits, and on how many prompts the text is the same: the artifact without speculation rounds attention in "
        "another order, so that near ties go another way.",
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
                said = "" if name in writing.PEERS else f", {per_call(found, name):.2f}, {same}"
                cells.append(f"{np.median(ratios):.2f} ({min(ratios):.2f}){said}")
            every = [r for kind in KINDS for r in speeds(report[f"{kind}/{temperature}"], name)]
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {np.mean(every):.2f} |")
        plain = [own for kind in KINDS for own in report[f"{kind}/{temperature}"]["without"]]
        rate = sum(len(own["tokens"]) - 1 for own in plain) / sum(own["seconds"] for own in plain)
        lines += ["", f"Without: {rate:.1f} tokens/s.", ""]
    lines += _handing(report["handed"])
    lines += [f"{name} is left out: {why}.\n" for name, why in report["peers"].items() if why]
    return "\n".join([*lines, "```json", json.dumps(report["machine"], indent=1), "```", ""])


def _handing(found: Mapping[str, list[Any]]) -> list[str]:
    """What the outputs cost that an artifact hands to a host which proposes nothing."""
    lines = ["## What `verify` hands to its host", ""]
    lines += [
        "Tokens/s of decoding chats greedily without a drafter, over those of the pipeline without `verify`, which the "
        "row above names: the median over prompts (the slowest). `h2o` has a cache of 256 tokens here.",
        "",
        "| pipeline | speed |",
        "|---|---|",
    ]
    names = list(found)
    for plain, handing in zip(names[::2], names[1::2], strict=True):
        ratios = speeds({name: found[name] for name in (plain, handing)}, handing)
        lines += [f"| `{plain}` | 1 |", f"| `{handing}` | {np.median(ratios):.3f} ({min(ratios):.3f}) |"]
    return [*lines, ""]


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
            middle = place - (len(names) - 1) / 2
            axis.bar(
                np.arange(len(KINDS)) + 0.85 / len(names) * middle, heights, 0.8 / len(names), label=name
            )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(KINDS)), KINDS)
        axis.set_title(f"temperature {temperature:g}")
    axes[0].set_ylabel("speed over decoding without")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), fontsize=7)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def draw_lengths(report: Mapping[str, Any], path: Path) -> None:
    """Histograms of the tokens that a greedy call commits."""
    from matplotlib import pyplot

    names = list(ENGINES)[1:]
    figure, grid = pyplot.subplots(
        len(names),
        len(KINDS),
        figsize=(11, 1.6 * len(names)),
        sharex=True,
        sharey=True,
        constrained_layout=True,
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
    parser.add_argument("--tokens", type=int, default=NEW, help=f"new tokens (default: {NEW})")
    parser.add_argument(
        "--prompts", type=int, default=PROMPTS, help=f"prompts of a kind, 8 at most (default: {PROMPTS})"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--serve", metavar="NAME", help="be the process of one engine")
    parser.add_argument(
        "--build", nargs=2, metavar=("PIPELINE", "ARTIFACT"), help="write one engine's artifact"
    )
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.threads)
    elif options.build:
        build(*options.build)
    else:
        write(options.results, measure_all(options.prompts, options.tokens, options.threads), options.threads)


def measure_all(count: int, tokens: int, threads: int) -> dict[str, Any]:
    """Every part; those that another run finished are taken from it."""
    from tokopt.runtime import load

    prepare()
    folder = cache_folder() / "benchmark-speculate" / f"{count}x{tokens}"
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder)
    peers = progress.once("peers", lambda: startable(writing.installed(), threads))
    writes = [name for name, why in peers.items() if not why]
    given = prompts(load(artifact(ENGINES["without"].pipeline), verify=False))

    def part(key: str, engines: Sequence[str], kind: str, temperature: float) -> None:
        print(key, file=sys.stderr, flush=True)
        texts = given[kind][:count]
        progress.once(key, lambda: measure(engines, texts, temperature, tokens, threads))

    for temperature in TEMPERATURES:
        for kind in KINDS:
            part(f"{kind}/{temperature}", [*ENGINES, *([] if temperature else writes)], kind, temperature)
    part("handed", list(HANDED), "chat", 0.0)
    return {"tokens": tokens, **progress.values}


def write(results: Path, measured: dict[str, Any], threads: int) -> None:
    """The table, the pictures, and all that was measured."""
    report = {"machine": describe(threads), **measured}
    text = markdown(report)
    results.mkdir(parents=True, exist_ok=True)
    write_atomically(results / "speculate.json", lambda path: path.write_text(json.dumps(report) + "\n"))
    write_atomically(results / "speculate.md", lambda path: path.write_text(text))
    write_atomically(results / "speculate.png", lambda path: draw(report, path))
    write_atomically(results / "speculate-lengths.png", lambda path: draw_lengths(report, path))
    print(text)


if __name__ == "__main__":
    main()
