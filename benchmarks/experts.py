"""What a token of a mixture of experts costs beside dense models: ``python -m benchmarks.experts``.

A mixture like Mixtral, 16 layers of 512 channels with 8 experts of which 2 are chosen, with random weights; the dense
model with as many active parameters; and the dense one with as many as all experts have, which is what a token costs
where all of them are computed. In float32 and in 4 bits, with tokopt's CPU kernels and without them. Every engine has
its own process and they take turns. Of a turn's tokens, which differ so that their experts do, the lower quartile
counts, and of the turns the median; a prompt is read at once. Finished parts are kept, so a run that was cut off goes
on where it was. Writes ``experts.json`` and ``experts.md`` in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.progress import Progress, write_report
from benchmarks.worker import Worker, answer_all, medians
from examples.data import cache_folder

RESULTS = Path(__file__).parent / "results"
LAYERS, HIDDEN, HEADS, KEY_HEADS, VOCABULARY = 16, 512, 8, 2, 8192
EXPERTS, CHOSEN = 8, 2
INNERS = (1792, 704)
"""Channels of one expert: Mixtral's 3.5 times the hidden ones, and fewer."""

METHODS: Mapping[str, str] = {"float32": "", "4 bits": "rtn{bits=4}"}
MODELS: Mapping[str, int] = {
    "dense, the active parameters": CHOSEN,
    "mixture": 0,
    "dense, all parameters": EXPERTS,
}
"""Model -> how many experts' parameters its layers have; 0 for the mixture itself."""

DENSE, MIXTURE, ALL = MODELS
PROMPT, TOKENS, ROWS, REPEATS, LONG = 64, 48, 8, 16, 256
MEASURES = ("a token", f"{ROWS} tokens at once", f"a prompt of {LONG}")


@dataclass(frozen=True)
class Engine:
    """An artifact to time in a process of its own, with or without tokopt's kernels."""

    name: str
    artifact: str
    kernels: bool
    threads: int


def worker(engine: Engine) -> Worker:
    """An engine in its own process, which answers with the seconds of one turn."""
    return Worker(engine.name, "benchmarks.experts", "--serve", json.dumps(asdict(engine)))


def serve(engine: Engine) -> None:
    """Answer with a turn."""
    measure = timer(engine)
    answer_all(lambda _: dict(measure()))


def timer(engine: Engine) -> Callable[[], Mapping[str, float]]:
    """A turn of tokopt's runtime."""
    from tokopt.runtime import LanguageModel, load

    model = load(engine.artifact, threads=engine.threads, kernels=engine.kernels, verify=False)
    assert isinstance(model, LanguageModel)
    slots = max(LONG, PROMPT + TOKENS + ROWS * REPEATS)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, slots)

    def call(request: Any, start: int, count: int) -> float:
        tokens, positions = ids[None, start : start + count], np.arange(start, start + count)[None]
        clock = time.perf_counter()
        request.step(tokens, positions)
        return time.perf_counter() - clock

    def measure() -> Mapping[str, float]:
        request = model.open(1, slots)
        request.prefill([ids[:PROMPT].tolist()])
        single = [call(request, PROMPT + i, 1) for i in range(TOKENS)]
        several = [call(request, PROMPT + TOKENS + i * ROWS, ROWS) for i in range(REPEATS)]
        request = model.open(1, slots)
        clock = time.perf_counter()
        request.prefill([ids[:LONG].tolist()])
        prompt = time.perf_counter() - clock
        typical = [float(np.quantile(calls, 0.25)) for calls in (single, several)]
        return dict(zip(MEASURES, (*typical, prompt), strict=True))

    return measure


def artifact(folder: Path, model: str, method: str, inner: int) -> Path:
    """The exported artifact of a model with random weights, made if it is not there."""
    path = folder / f"{inner}-{MODELS[model]}-{method.replace(' ', '-')}.tokopt"
    if not path.exists():
        import tokopt

        bundle = tokopt.capture_lm(random_model(MODELS[model], inner))
        bundle = tokopt.optimize(bundle, METHODS[method]) if METHODS[method] else bundle
        tokopt.export(bundle, path)
    return path


def random_model(experts: int, inner: int) -> Any:
    """A dense model with the parameters of so many experts, or the mixture where that is 0."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": 2048,
        "sliding_window": None,
    }
    torch.manual_seed(0)
    if experts:
        return MistralForCausalLM(MistralConfig(**sizes, intermediate_size=experts * inner)).eval()
    mixture = MixtralConfig(
        **sizes, intermediate_size=inner, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN
    )
    return MixtralForCausalLM(mixture).eval()


def engines(folder: Path, method: str, inner: int, threads: int) -> list[Engine]:
    """The three models with and without tokopt's kernels."""
    paths = {model: str(artifact(folder, model, method, inner)) for model in MODELS}
    kinds = {"": True, ", no kernels of tokopt": False}
    return [
        Engine(model + label, path, kernels, threads)
        for label, kernels in kinds.items()
        for model, path in paths.items()
    ]


# --- report -----------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """A table for each size of experts and each kind of weights."""
    lines = ["# What a mixture of experts costs", ""]
    lines += [
        f"Random weights; {LAYERS} layers of {HIDDEN} channels, {EXPERTS} experts of which {CHOSEN} are chosen, "
        f"{VOCABULARY} tokens in the vocabulary. Milliseconds, and in brackets the ratio to the dense model with as "
        "many active parameters on the same engine.",
        "",
    ]
    for inner in INNERS:
        for method in METHODS:
            found = report.get(f"{inner}/{method}")
            if found is None:
                continue
            lines += [f"## {method}, experts of {inner} channels", ""]
            lines += ["| model | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
            lines += [_row(name, seconds, found) for name, seconds in found.items()] + [""]
    return "\n".join([*lines, "```json", json.dumps(report["machine"], indent=1), "```", ""])


def _row(name: str, seconds: Mapping[str, float], found: Mapping[str, Mapping[str, float]]) -> str:
    model, comma, rest = name.partition(", no kernels")
    base = found[DENSE + comma + rest]
    cells = [f"{1e3 * seconds[key]:.1f} ({seconds[key] / base[key]:.2f})" for key in MEASURES]
    return f"| {model}{comma}{rest} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--inners", nargs="+", type=int, choices=INNERS, default=list(INNERS))
    parser.add_argument("--folder", type=Path, help="where artifacts and measurements are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--serve", metavar="ENGINE", help="be the process of one engine (JSON)")
    options = parser.parse_args()
    if options.serve:
        serve(Engine(**json.loads(options.serve)))
        return
    folder = options.folder or cache_folder() / "benchmark-experts"
    folder.mkdir(parents=True, exist_ok=True)
    options.results.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder)
    for inner in options.inners:
        for method in options.methods:
            print(f"{method}, experts of {inner} channels", file=sys.stderr, flush=True)
            made = [partial(worker, one) for one in engines(folder, method, inner, options.threads)]
            progress.once(f"{inner}/{method}", lambda own=made: medians(own, options.rounds))
    report = json.loads(json.dumps({"machine": describe(options.threads), **progress.values}))
    text = markdown(report)
    write_report(options.results, "experts", report, text)
    print(text)


if __name__ == "__main__":
    main()
