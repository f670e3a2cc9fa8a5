"""Tables and charts of what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kv.policies import BUDGET, EVERY
from benchmarks.kv.quality import DEPTHS, PROMPT, SCORED, WINDOWS

Report = Mapping[str, Any]


def markdown(report: Report) -> str:
    """Everything as tables."""
    lines = ["# KV eviction, float32, ONNX Runtime CPU", ""]
    for model, policies in report["quality"].items():
        lines += quality_table(model, policies)
    for model, contexts in report["speed"].items():
        lines += speed_table(model, contexts)
    return "\n".join([*lines, "```json", json.dumps(report["machine"], indent=1), "```", ""])


def quality_table(model: str, policies: Report) -> list[str]:
    """Perplexity and retrieval of one model, a row per policy and a column per budget."""
    shares = list(next(iter(policies.values()))["perplexity"])
    names = [f"1/{round(1 / float(share))}" for share in shares]
    full = math.exp(policies["full"]["perplexity"][shares[0]])
    contexts = " and ".join(policies["full"]["retrieval"])
    lines = [f"## Quality: {model} (weights expanded from 4-bit blocks)", ""]
    lines += [
        f"Perplexity of {WINDOWS} x {SCORED} tokens of Python's documentation after a prompt of {PROMPT}, over that of "
        f"the full cache ({full:.2f}); retrieval of a five-digit code hidden in {contexts} tokens of it "
        f"({len(DEPTHS)} depths each): exact answers, and nats per token of the answer. Budgets are shares of the "
        f"prompt; slots are chosen again after every {EVERY} tokens.",
        "",
        "| policy | " + " | ".join(f"perplexity, {n}" for n in names) + " | "
        "" + " | ".join(f"retrieval, {n}" for n in names) + " |",
        "|---" * (1 + 2 * len(names)) + "|",
    ]
    for policy, scores in policies.items():
        ratios = [math.exp(scores["perplexity"][share]) / full - 1 for share in shares]
        found = [retrieved(scores, share) for share in shares]
        cells = [f"{ratio:+.1%}" for ratio in ratios] + [f"{e:.0%}, {n:.2f}" for e, n in found]
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def retrieved(scores: Report, share: str) -> tuple[float, float]:
    """Exact answers, and nats per token, over all contexts."""
    parts = [context[share] for context in scores["retrieval"].values()]
    return float(np.mean([p["exact"] for p in parts])), float(np.mean([p["nats"] for p in parts]))


def speed_table(model: str, contexts: Report) -> list[str]:
    """Time and bytes of one model, a row per policy and two columns per context."""
    lines = [f"## Speed: {model}, budget {BUDGET} slots, batch 1", ""]
    lines += [
        "Milliseconds per token, evictions included, and the ratio to the full cache in the same rounds; megabytes of "
        "cache allocated.",
        "",
        "| policy | " + " | ".join(f"{c} tokens: ms | ratio | MB" for c in contexts) + " |",
        "|---" * (1 + 3 * len(contexts)) + "|",
    ]
    columns = [{timing["name"]: timing for timing in timings} for timings in contexts.values()]
    for policy in columns[0]:
        cells = [
            f"{1e3 * c[policy]['median'] / EVERY:.1f} | {c[policy]['ratio_median']:.2f} | "
            f"{c[policy]['bytes'] / 1e6:.0f}"
            if policy in c
            else "not measured | |"
            for c in columns
        ]
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def draw(report: Report, folder: Path) -> None:
    """``kv-quality.png`` and ``kv-speed.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    models = report["quality"]
    figure, axes = pyplot.subplots(len(models), 2, figsize=(10, 3.6 * len(models)), squeeze=False)
    for row, (model, policies) in zip(axes, models.items(), strict=True):
        _draw_quality(row, model, policies)
    axes[0][1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    _save(figure, folder / "kv-quality.png")
    for contexts in report["speed"].values():
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6))
        _draw_speed(axes, contexts)
        axes[1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
        _save(figure, folder / "kv-speed.png")


def _draw_quality(axes: Any, model: str, policies: Report) -> None:
    full = policies["full"]["perplexity"]
    for policy, scores in policies.items():
        if policy == "full":
            continue
        shares = [float(share) for share in scores["perplexity"]]
        over = [100 * (math.exp(v - full[share]) - 1) for share, v in scores["perplexity"].items()]
        exact = [100 * retrieved(scores, share)[0] for share in scores["perplexity"]]
        for axis, values in zip(axes, (over, exact), strict=True):
            axis.plot(shares, values, label=policy, **_style(policy))
    share = next(iter(full))
    axes[1].axhline(100 * retrieved(policies["full"], share)[0], color="black", lw=0.8, ls="--", label="full")
    axes[0].set(title=f"{model}: perplexity over full cache, %", ylim=(0, None))
    axes[1].set(title="hidden codes found, %", ylim=(-4, 104))
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(shares, [f"1/{round(1 / share)}" for share in shares])
        axis.set_xlabel("budget, share of the prompt")


def _draw_speed(axes: Any, contexts: Report) -> None:
    columns = {int(c): {timing["name"]: timing for timing in timings} for c, timings in contexts.items()}
    for policy in next(iter(columns.values())):
        chosen = {context: timings[policy] for context, timings in columns.items() if policy in timings}
        milliseconds = [1e3 * timing["median"] / EVERY for timing in chosen.values()]
        axes[0].plot(list(chosen), milliseconds, label=policy, **_style(policy))
        megabytes = [timing["bytes"] / 1e6 for timing in chosen.values()]
        axes[1].plot(list(chosen), megabytes, label=policy, **_style(policy))
    axes[0].set(title="ms per token, evictions included", xlabel="tokens of context", ylim=(0, None))
    axes[1].set(title="megabytes of cache", xlabel="tokens of context", ylim=(0, None))


def _style(policy: str) -> dict[str, Any]:
    if policy in ("full", "random"):
        return {"color": "black" if policy == "full" else "grey", "ls": "--", "marker": "o", "ms": 3}
    return {"marker": "o", "ms": 3, "lw": 1.2}


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": ""})
