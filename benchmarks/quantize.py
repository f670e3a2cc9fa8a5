"""Quantization measured: ``python -m benchmarks.quantize``.

Every method on DINOv2 ViT-S/14 and all-MiniLM-L6-v2 (weights of full precision) and on SmolLM2-135M (weights that were
expanded from a 4-bit file): bytes, what it costs on inputs that calibration has not seen, and time against float32 in
the same rounds. Quality is that of the artifact as ONNX Runtime executes it. Writes ``quantize.json`` and
``quantize.md`` in ``benchmarks/results``; finished parts are kept, so a run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.decode import TOKENS
from benchmarks.kv.quality import documentation
from benchmarks.machine import describe
from benchmarks.progress import Progress
from benchmarks.timing import Engine, compare
from examples.data import (
    cache_folder,
    class_feature,
    dinov2_small,
    minilm,
    photograph_views,
    sentence_embedding,
    smollm2,
    write_atomically,
)
from tokopt.measure.distance import predictions
from tokopt.runtime import LanguageModel, load
from tokopt.runtime.loop import PREFILL
from tokopt.runtime.numerics import cosines

RESULTS = Path(__file__).parent / "results"
SIZE, WINDOW, TEXTS = 224, 512, 12
"""Pixels per side; tokens per text; texts to calibrate with, and as many others to judge by."""

MODELS: Mapping[str, Mapping[str, str]] = {
    "DINOv2-S": {
        "float32": "",
        "rtn, 8 bits": "rtn{bits=8}",
        "rtn": "rtn",
        "gptq": "gptq",
        "awq": "awq",
        "nupes": "nupes",
        "int8": "int8",
        "int8, static": "int8{activations=static}",
        "smoothquant, int8, static": "smoothquant,int8{activations=static}",
        "tome": "tome{r=16}",
        "tome, int8": "tome{r=16},int8",
    },
    "MiniLM-L6": {
        "float32": "",
        "rtn, 8 bits": "rtn{bits=8}",
        "rtn": "rtn",
        "gptq": "gptq",
        "awq": "awq",
        "nupes": "nupes",
        "int8": "int8",
        "int8, static": "int8{activations=static}",
    },
    "SmolLM2-135M-Instruct": {
        "float32": "",
        "keep_grid": "keep_grid",
        "rtn, 8 bits": "rtn{bits=8}",
        "rtn": "rtn",
        "gptq": "gptq",
        "awq": "awq",
        "rtn, symmetric": "rtn{symmetric=true}",
        "gptq, ordered": "gptq{order=true}",
        "gptq, 4.5 bits": "gptq{order=true average=4.5}",
        "gptq, groups of 16": "gptq{group=16 order=true}",
        "keep_grid, 8-bit cache": "keep_grid,int8_kv",
        "rtn, 8 bits, 8-bit cache": "rtn{bits=8},int8_kv",
        "gptq, ordered, 8-bit cache": "gptq{order=true},int8_kv",
    },
}
"""Model -> name in the tables -> pipeline; the first is what the others are compared with."""

TIMED = {
    "DINOv2-S": ("session", (1, 8)),
    "MiniLM-L6": ("session", (1, 8)),
    "SmolLM2-135M-Instruct": ("step", (64, 1024)),
}
"""Kind of engine, and the batches or prompts that it is timed with."""

SENTENCES, LONGEST = 48, 128


# --- data -------------------------------------------------------------------------------------------------


def images() -> list[NDArray[np.float32]]:
    """Views of photographs [1, 3, side, side]; those of even places are for calibration."""
    return [view[None] for view in photograph_views(SIZE)]


def paragraphs() -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Paragraphs of Python's documentation, spread over it, as ids and mask [1, tokens] of at most 128 tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    found = [text for text in documentation().split("\n\n") if len(text) > 80]
    chosen = (found[i] for i in np.linspace(0, len(found) - 1, SENTENCES).astype(int))
    rows = (np.array([tokenizer.encode(text).ids], np.int64) for text in chosen)
    return [(ids, np.ones_like(ids)) for ids in rows]


def texts(model: LanguageModel) -> list[list[int]]:
    """Windows of Python's documentation, spread over it; those of even places are for calibration."""
    ids = model.tokenizer.encode(documentation())
    starts = np.linspace(0, len(ids) - WINDOW, 2 * TEXTS).astype(int)
    return [ids[start : start + WINDOW] for start in starts]


# --- artifacts --------------------------------------------------------------------------------------------


def build(model: str, method: str, path: Path) -> None:
    """Capture, quantize and export; called in a process of its own."""
    import torch

    import tokopt

    pipeline = MODELS[model][method]
    samples: list[Any]
    if model == "DINOv2-S":
        samples = images()[::2]
        bundle = tokopt.capture(
            class_feature(dinov2_small(SIZE)), (torch.from_numpy(np.concatenate(samples[:2])),)
        )
    elif model == "MiniLM-L6":
        samples = paragraphs()[::2]
        ids = torch.arange(2 * 32).reshape(2, 32) + 1000
        axes = ("batch", "tokens")
        bundle = tokopt.capture(
            sentence_embedding(minilm()),
            (ids, torch.ones_like(ids)),
            dynamic={"input_ids": axes, "attention_mask": axes},
        )
    else:
        bundle = tokopt.capture_lm(smollm2())
        samples = texts(load(work_folder() / f"{model} float32.tokopt"))[::2] if pipeline else []
    tokopt.export(tokopt.optimize(bundle, pipeline, calibration=samples), path)


def artifact(model: str, method: str) -> Path:
    path = work_folder() / f"{model} {method}.tokopt"
    if not path.exists():
        subprocess.run(
            [sys.executable, "-m", "benchmarks.quantize", "--build", model, method, path], check=True
        )
    return path


def work_folder() -> Path:
    folder = cache_folder() / "benchmark-quantize"
    folder.mkdir(exist_ok=True)
    return folder


# --- what is measured -------------------------------------------------------------------------------------


def outputs(model: str, method: str, threads: int) -> list[NDArray[np.floating]]:
    """Features, or logits [tokens, vocabulary], of what calibration has not seen."""
    loaded: Any = load(artifact(model, method), threads=threads)
    if model == "DINOv2-S":
        return [loaded(image)[0] for image in images()[1::2]]
    if model == "MiniLM-L6":
        return [loaded(*sample)[0] for sample in paragraphs()[1::2]]
    return [logits(loaded, text) for text in texts(loaded)[1::2]]


def logits(model: LanguageModel, ids: list[int]) -> NDArray[np.floating]:
    """The logits after every token of a text."""
    request = model.open(1, len(ids))
    parts = []
    for start in range(0, len(ids), PREFILL):
        part = np.array([ids[start : start + PREFILL]])
        rows = np.arange(part.shape[1])
        found = request.step(part, start + rows[None], rows).logits
        assert found is not None
        parts.append(found[0].copy())
    return np.concatenate(parts)


def quality(model: str, wanted: list[Any], got: list[Any]) -> dict[str, float]:
    """Cosine of features; or KL divergence, top-1 agreement and perplexity."""
    if TIMED[model][0] == "session":
        similar = cosines(np.stack(wanted), np.stack(got))
        return {"cosine": float(similar.mean()), "smallest cosine": float(similar.min())}
    judged = texts(load(artifact(model, "float32")))[1::2]
    rows = [
        predictions(a[:-1], b[:-1], np.array(ids[1:])) for a, b, ids in zip(wanted, got, judged, strict=True)
    ]
    kl, top1, _, nats = np.concatenate(rows).mean(0)
    return {"KL": float(kl), "top-1": float(top1), "perplexity": float(np.exp(nats))}


def timings(model: str, threads: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every method against float32, by batch or prompt."""
    kind, sizes = TIMED[model]
    found = {}
    for size in sizes:
        each = SIZE if model == "DINOv2-S" else LONGEST
        batch, second = (size, each) if kind == "session" else (1, size)
        engines = [
            Engine(method, kind, artifact(model, method), batch, second, threads) for method in MODELS[model]
        ]
        found[str(size)] = [asdict(timing) for timing in compare(engines, rounds)]
    return found


def megabytes(model: str, method: str) -> float:
    return (artifact(model, method) / "weights.data").stat().st_size / 1e6


# --- the report -------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    lines = ["# Quantization, ONNX Runtime CPU", ""]
    for model, methods in report["quality"].items():
        expanded = " (weights expanded from 4-bit blocks)" if model.startswith("Smol") else ""
        timed = report["time"].get(model, {})
        word, calls = ("batch", 1) if TIMED[model][0] == "session" else ("prompt", TOKENS)
        measures = list(next(iter(methods.values())))
        heads = [*measures, *(f"{word} {size}: ms | ratio" for size in timed)]
        lines += [f"## {model}{expanded}", "", "| method | pipeline | " + " | ".join(heads) + " |"]
        lines.append("|---" * (2 + len(measures) + 2 * len(timed)) + "|")
        for method, values in methods.items():
            cells = [f"{values[name]:.4g}" for name in measures]
            for rows in timed.values():
                row = next((row for row in rows if row["name"] == method), None)
                cells.append(
                    f"{1e3 * row['median'] / calls:.1f} | {row['ratio_median']:.2f}" if row else "– | –"
                )
            lines.append(f"| {method} | `{MODELS[model][method]}` | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, "```json", json.dumps(report["machine"], indent=1), "```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize", description=__doc__)
    parser.add_argument("--only", choices=("quality", "time", "report"), help="one part of the work")
    parser.add_argument("--model", choices=list(MODELS), nargs="*", default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--build", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        model, method, path = options.build
        build(model, method, Path(path))
        return
    progress = Progress(work_folder())
    for model in options.model:
        if options.only in (None, "quality"):
            measure_quality(progress, model, options.threads)
        if options.only in (None, "time"):
            progress.once(f"time/{model}", lambda m=model: timings(m, options.threads, options.rounds))
    write(progress.values, options.threads)


def measure_quality(progress: Progress, model: str, threads: int) -> None:
    wanted: list[Any] = []
    for method in MODELS[model]:
        if f"quality/{model}/{method}" in progress.values:
            continue
        print(f"{model}: {method}", file=sys.stderr, flush=True)
        wanted = wanted or outputs(model, "float32", threads)
        found = quality(model, wanted, outputs(model, method, threads))
        progress.put(f"quality/{model}/{method}", {"MB": megabytes(model, method), **found})


def write(values: Mapping[str, Any], threads: int) -> None:
    report: dict[str, Any] = {"machine": describe(threads), "quality": {}, "time": {}}
    for model, methods in MODELS.items():
        known = {m: values[f"quality/{model}/{m}"] for m in methods if f"quality/{model}/{m}" in values}
        if known:
            report["quality"][model] = known
        if f"time/{model}" in values:
            report["time"][model] = values[f"time/{model}"]
    for name, content in (
        ("quantize.json", json.dumps(report, indent=1) + "\n"),
        ("quantize.md", markdown(report)),
    ):
        write_atomically(RESULTS / name, lambda path, content=content: path.write_text(content))
    print(markdown(report))


if __name__ == "__main__":
    main()
