"""KV eviction measured: ``python -m benchmarks.kv``.

Perplexity and retrieval of every policy on two models, and time and bytes on SmolLM2, into
``benchmarks/results/kv.json``, ``kv.md``, ``kv-quality.png`` and ``kv-speed.png``. Finished parts are kept, so a run
that was cut off goes on where it was. ``--only speed`` wants the machine for itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.kv.policies import COMPLETE, MODELS, POLICIES, artifact, work_folder
from benchmarks.kv.quality import CONTEXTS, PROMPTS, SHARES, perplexity, retrieval
from benchmarks.kv.report import draw, markdown
from benchmarks.kv.speed import CONTEXTS as TIMED
from benchmarks.kv.speed import measure
from benchmarks.machine import describe
from benchmarks.progress import Progress
from examples.data import write_atomically

RESULTS = Path(__file__).parents[1] / "results"
FASTEST = next(iter(MODELS))
"""The model that is timed."""


def quality(progress: Progress, model: str, policy: str, threads: int) -> None:
    """Perplexity and retrieval; what holds every token has one budget, and scores the same at every other."""
    from tokopt.runtime import load

    loaded: list[Any] = []  # an artifact is made and loaded for a measurement that is not known yet only

    def measured(key: str, measure: Callable[..., Any], *arguments: Any) -> None:
        def run() -> Any:
            print(key, file=sys.stderr, flush=True)
            if not loaded:
                loaded.append(load(artifact(model, policy), threads=threads))
            shares = SHARES if policy not in COMPLETE else (1.0,)
            found = measure(loaded[0], *arguments, shares)
            return found if policy not in COMPLETE else {str(share): found["1.0"] for share in SHARES}

        progress.once(f"{key}/{model}/{policy}", run)

    for length in PROMPTS[model]:
        measured(f"perplexity {length}", perplexity, length)
    for length in CONTEXTS[model]:
        measured(f"retrieval {length}", retrieval, length)
    if model != FASTEST:
        shutil.rmtree(work_folder() / f"{model} {policy}.tokopt", ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv", description=__doc__)
    parser.add_argument("--only", choices=("quality", "speed", "report"), help="one part of the work")
    parser.add_argument(
        "--model", choices=list(MODELS), nargs="*", default=list(MODELS), help="whose quality"
    )
    parser.add_argument("--policy", choices=list(POLICIES), nargs="*", default=list(POLICIES), help="which")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    progress = Progress(work_folder())
    if options.only in (None, "quality"):
        for model in options.model:
            for policy in options.policy:
                print(f"quality: {model}, {policy}", file=sys.stderr, flush=True)
                quality(progress, model, policy, options.threads)
    if options.only in (None, "speed"):
        policies = [policy for policy in options.policy if policy != "full"]
        for context in TIMED:
            print(f"speed: {context} tokens", file=sys.stderr, flush=True)
            timed = lambda c=context: measure(FASTEST, policies, c, options.threads, options.rounds)  # noqa: E731
            progress.once(f"speed/{FASTEST}/{context}", timed)
    write(collect(progress.values, options.threads))


def collect(values: dict[str, Any], threads: int) -> dict[str, Any]:
    """The finished measurements: quality by model, policy and measure; speed by model and context."""
    report: dict[str, Any] = {"machine": describe(threads), "quality": {}, "speed": {}}
    for key, value in values.items():
        part, model, what = key.split("/")
        if part == "speed":
            report["speed"].setdefault(model, {})[what] = value
        else:
            report["quality"].setdefault(model, {}).setdefault(what, {})[part] = value
    for model, policies in report["quality"].items():  # in the order of the tables, not that of measuring
        report["quality"][model] = {policy: policies[policy] for policy in POLICIES if policy in policies}
    return report


def write(report: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    for name, content in (("kv.json", json.dumps(report, indent=1) + "\n"), ("kv.md", markdown(report))):
        write_atomically(RESULTS / name, lambda path, content=content: path.write_text(content))
    draw(report, RESULTS)
    print(markdown(report))


if __name__ == "__main__":
    main()
