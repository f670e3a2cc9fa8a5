"""tokopt against other engines on this machine: ``python -m benchmarks.peers``.

DINOv2 ViT-S/14 at 224 px and SmolLM2-135M on torch, transformers, ONNX Runtime, OpenVINO, llama.cpp and the two GenAI
runtimes, and what the machine could do at best. Every engine has its own process and they take turns; quality stands
beside speed. An engine that is not installed (extra ``peers``) is left out with its reason. Finished parts are kept,
so a run that was cut off goes on where it was. Writes ``benchmarks/results/peers.json`` and ``peers.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import quantize
from benchmarks.machine import describe
from benchmarks.peers import language, limits, vision
from benchmarks.peers.report import markdown
from benchmarks.progress import Progress
from benchmarks.timing import Engine, Turns, compare
from examples.data import cache_folder, write_atomically

TEXT = quantize.WINDOW
"""Tokens of a text that fidelity is measured on."""

RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument(
        "--only", choices=("vision", "language", "limits", "report"), help="one part of the work"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder = cache_folder() / "benchmark-peers"
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder)
    parts = {"vision": measure_vision, "language": measure_language, "limits": measure_limits}
    for name, measure in parts.items():
        if options.only in (None, name):
            measure(progress, folder / name, options.threads, options.rounds)
    report = {"machine": describe(options.threads), **progress.values}
    for name, content in (
        ("peers.json", json.dumps(report, indent=1) + "\n"),
        ("peers.md", markdown(report)),
    ):
        write_atomically(RESULTS / name, lambda path, content=content: path.write_text(content))
    print(markdown(report))


def measure_vision(progress: Progress, folder: Path, threads: int, rounds: int) -> None:
    """Fidelity of every engine, then seconds per batch of those that run."""
    vision.prepare(folder)
    quality = progress.values.get("vision/quality", {})
    for name, engine in vision.engines(folder, 1, threads).items():
        if name not in quality:
            print(name, file=sys.stderr, flush=True)
            quality[name] = _or_reason(lambda e=engine: vision.fidelity(e, vision.reference(folder)))
            progress.put("vision/quality", quality)
    for batch in vision.BATCHES:
        engines = vision.engines(folder, batch, threads)
        running = [engine for name, engine in engines.items() if "reason" not in quality[name]]
        progress.once(f"vision/time/{batch}", lambda e=running: timed(e, rounds))


def measure_language(progress: Progress, folder: Path, threads: int, rounds: int) -> None:
    """Fidelity of every engine that changes weights, decoding after every prompt, and reading the longest."""
    language.prepare(folder)
    judge_language(progress, folder, threads)
    kinds = [(prompt, False) for prompt in language.PROMPTS] + [(language.PROMPTS[-1], True)]
    for prompt, reading in kinds:
        engines = list(language.engines(folder, prompt, threads, reading).values())
        key = f"language/{'read' if reading else 'decode'}/{prompt}"
        progress.once(key, lambda e=engines: timed(_startable(progress, e), rounds))


def judge_language(progress: Progress, folder: Path, threads: int) -> None:
    """Fidelity to the float32 model, or why it cannot be measured; the reference's own is none."""
    quality, wanted = progress.values.get("language/quality", {}), []
    for name, engine in language.engines(folder, TEXT, threads, False).items():
        if name in quality or engine.kind == "transformers":
            continue
        print(name, file=sys.stderr, flush=True)
        wanted = wanted or language.reference(threads)
        quality[name] = _or_reason(lambda e=engine, w=wanted: language.fidelity(e, w))
        progress.put("language/quality", quality)


def measure_limits(progress: Progress, folder: Path, threads: int, rounds: int) -> None:
    """The machine's rates, what steps have to read, and their profiles."""
    progress.once("limits/rates", lambda: limits.rates(threads))
    for method in language.METHODS:
        path = quantize.artifact(language.MODEL, method)
        for prompt in language.PROMPTS:
            progress.once(
                f"limits/step/{method}/{prompt}",
                lambda p=path, n=prompt: {
                    "bytes": limits.step_bytes(p, n),
                    "profile": limits.step_profile(p, n, threads),
                },
            )


def timed(engines: list[Engine], rounds: int) -> list[dict[str, Any]]:
    return [asdict(timing) for timing in compare(engines, rounds)]


def _startable(progress: Progress, engines: list[Engine]) -> list[Engine]:
    """Those that start; why the others do not is kept."""
    found, reasons = [], dict(progress.values.get("language/missing", {}))
    for engine in engines:
        outcome = _or_reason(lambda e=engine: Turns(e).close() or {})
        if "reason" in outcome:
            reasons[engine.name] = outcome["reason"]
        else:
            found.append(engine)
    progress.put("language/missing", reasons)
    return found


def _or_reason(measure: Any) -> Mapping[str, Any]:
    """What is measured, or why it cannot be."""
    try:
        return measure()
    except Exception as error:  # whatever an engine raises
        return {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


if __name__ == "__main__":
    main()
