"""What fewer blocks of a language model cost and save: ``python -m benchmarks.depth``.

SmolLM2-135M with 8-bit weights, whole, without its blocks of least influence (``drop_blocks``, with and without
healing), and with fewer blocks for later tokens (``skipdecode``). Windows of Python's documentation are read and then
decoded token by token; the engines take turns, and the same calls give nats per token and seconds. Beside them, how
often the tokens that the first blocks alone would choose are those of the whole model: what a model accepts that drafts
for itself. Finished parts are kept. Writes ``depth.json``, ``depth.md`` and ``depth.png`` in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kv.quality import documentation
from benchmarks.machine import describe
from benchmarks.progress import Progress
from examples.data import cache_folder, smollm2, write_atomically

RESULTS = Path(__file__).parent / "results"

WEIGHTS = "rtn{bits=8 group=32}"
ENGINES: Mapping[str, str] = {
    "whole": WEIGHTS,
    "drop 1": f"drop_blocks{{count=1}},{WEIGHTS}",
    "drop 2": f"drop_blocks{{count=2}},{WEIGHTS}",
    "drop 2, healed": f"drop_blocks{{count=2 heal=true}},{WEIGHTS}",
    "drop 4": f"drop_blocks{{count=4}},{WEIGHTS}",
    "drop 4, healed": f"drop_blocks{{count=4 heal=true}},{WEIGHTS}",
    "skip to 26": f"{WEIGHTS},skipdecode{{min=26 over=32}}",
    "skip to 20": f"{WEIGHTS},skipdecode{{min=20 over=32}}",
}
"""Name in the tables -> pipeline; the first is what the others are compared with."""

READ, DECODED, WINDOWS = 256, 96, 8
"""Tokens of a window that are read at once, and then one by one; windows."""

NMSE = 1e-8
"""Of logits on random tokens, at most: without blocks that it was trained with a model enlarges what is rounded."""

SAMPLES, SAMPLE, DRAFTED = 16, 256, 2048
"""Calibration: texts of so many tokens, from the end of the documentation; tokens on which drafts are compared."""


def artifact(name: str) -> Path:
    """The artifact of an engine, exported once."""
    import tokopt

    folder = cache_folder() / "benchmark-depth"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.tokopt"
    if not path.exists():
        bundle = tokopt.capture_lm(smollm2())
        ids = tokens()[-SAMPLES * SAMPLE :]
        calibration = list(np.array(ids).reshape(SAMPLES, 1, SAMPLE))
        made = tokopt.optimize(bundle, ENGINES[name], strict=True, calibration=calibration)
        tokopt.export(made, path, tolerance=NMSE)
    return path


def tokens() -> list[int]:
    """Python's documentation of the language."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(smollm2() / "tokenizer.json")).encode(documentation()).ids


def decoded(model: Any, window: list[int]) -> dict[str, float]:
    """Nats per token of a window's end, and seconds per token."""
    from tokopt.runtime.sampling import log_probabilities

    request = model.open(1, len(window))
    logits = request.prefill([window[:READ]]).logits
    nats, seconds = 0.0, 0.0
    for place, token in enumerate(window[READ:], READ):
        nats -= float(log_probabilities(logits[0, -1:], [token])[0])
        begun = time.perf_counter()
        logits = request.step(np.array([[token]]), np.array([[place]])).logits
        seconds += time.perf_counter() - begun
    return {"nats": nats / DECODED, "seconds": seconds / DECODED}


def measure(threads: int) -> dict[str, list[dict[str, float]]]:
    """What every engine gave on every window."""
    from tokopt.runtime import load

    models = {name: load(artifact(name), threads=threads, verify=False) for name in ENGINES}
    ids = tokens()[: -SAMPLES * SAMPLE]
    starts = np.linspace(0, len(ids) - READ - DECODED, WINDOWS).astype(int)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
    for model in models.values():
        decoded(model, ids[: READ + DECODED])  # the first packs weights
    for start in starts:
        for name, model in models.items():
            found[name].append(decoded(model, ids[start : start + READ + DECODED]))
    return found


def drafts() -> list[float]:
    """By depth, how often norm and head after so many blocks choose the token that the whole model chooses."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    ids = torch.tensor(tokens()[:DRAFTED]).reshape(-1, SAMPLE)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        final = model.lm_head(states[-1]).argmax(-1)  # the last is normed already
        early = [model.lm_head(model.model.norm(state)).argmax(-1) for state in states[1:-1]]
    return [float((one == final).double().mean()) for one in early] + [1.0]


# --- report ---------------------------------------------------------------------------------------------------


def summary(report: Mapping[str, Any]) -> dict[str, tuple[float, float, float, list[float]]]:
    """By engine: perplexity, milliseconds per token, median speed over the whole model, and its quartiles."""
    base = [one["seconds"] for one in report["engines"]["whole"]]
    made: dict[str, tuple[float, float, float, list[float]]] = {}
    for name, rows in report["engines"].items():
        ratios = [b / row["seconds"] for b, row in zip(base, rows, strict=True)]
        quartiles = [float(x) for x in np.quantile(ratios, (0.25, 0.75))]
        perplexity = float(np.exp(np.mean([row["nats"] for row in rows])))
        seconds = float(np.median([row["seconds"] for row in rows]))
        made[name] = perplexity, 1e3 * seconds, float(np.median(ratios)), quartiles
    return made


def markdown(report: Mapping[str, Any]) -> str:
    """Two tables."""
    lines = ["# Depth of a language model: SmolLM2-135M-Instruct, 8-bit weights", ""]
    lines += [
        f"Perplexity of {DECODED} tokens decoded one by one after {READ}, over {WINDOWS} windows of Python's "
        "documentation, and the time of the same calls: the median ratio to the whole model, with quartiles.",
        "",
        "![Perplexity against speed, and drafts by depth](depth.png)",
        "",
        "| | pipeline | perplexity | ms per token | speed |",
        "|---|---|---|---|---|",
    ]
    for name, (perplexity, took, speed, (low, high)) in summary(report).items():
        lines.append(
            f"| {name} | `{ENGINES[name]}` | {perplexity:.2f} | {took:.2f} | {speed:.2f}x ({low:.2f} to {high:.2f}) |"
        )
    shown = [(depth, share) for depth, share in enumerate(report["drafts"], 1) if depth % 3 == 0]
    lines += ["", "Drafts of the first blocks alone that are the whole model's token:", ""]
    lines += ["| blocks | " + " | ".join(str(depth) for depth, _ in shown) + " |"]
    lines += ["|---" * (len(shown) + 1) + "|"]
    lines += ["| accepted | " + " | ".join(f"{share:.0%}" for _, share in shown) + " |"]
    return "\n".join([*lines, "", "```json", json.dumps(report["machine"], indent=1), "```", ""])


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Perplexity against speed, and accepted drafts against depth."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for name, (perplexity, _, speed, _) in summary(report).items():
        left.plot(speed, perplexity, "o", label=name)
    left.set_yscale("log")
    left.set_xlabel("speed over the whole model")
    left.set_ylabel("perplexity")
    left.legend(fontsize=8)
    right.plot(range(1, len(report["drafts"]) + 1), report["drafts"])
    right.set_xlabel("blocks")
    right.set_ylabel("tokens that are the whole model's")
    right.set_ylim(0, 1)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.depth", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--build", action="store_true", help="export the artifacts, and measure nothing")
    options = parser.parse_args()
    for name in ENGINES:
        print(f"{name}: {artifact(name)}", file=sys.stderr, flush=True)
    if options.build:
        return
    progress = Progress(cache_folder() / "benchmark-depth")
    progress.once("drafts", drafts)
    progress.once("engines", lambda: measure(options.threads))
    report = {"machine": describe(options.threads), **progress.values}
    text = markdown(report)
    write_atomically(RESULTS / "depth.json", lambda path: path.write_text(json.dumps(report) + "\n"))
    write_atomically(RESULTS / "depth.md", lambda path: path.write_text(text))
    write_atomically(RESULTS / "depth.png", lambda path: draw(report, path))
    print(text)


if __name__ == "__main__":
    main()
