"""Tables and charts of what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot

from benchmarks.kv.policies import BUDGET, EVERY, POLICIES
from benchmarks.kv.quality import DEPTHS, SCORED, WINDOWS

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
    """Perplexity and retrieval of one model, a row per policy and a column per measure and budget."""
    full = policies["full"]
    prompts, contexts = measures(full, "perplexity"), measures(full, "retrieval")
    shares = list(full[prompts[0]])
    names = [f"1/{round(1 / float(share))}" for share in shares]
    lengths = [prompt.split()[1] for prompt in prompts]
    baselines = " and ".join(f"{math.exp(full[prompt][shares[0]]):.2f}" for prompt in prompts)
    lines = [f"## Quality: {model} (weights expanded from 4-bit blocks)", ""]
    lines += [
        f"Perplexity of {WINDOWS} x {SCORED} tokens of Python's documentation after prompts of "
        f"{_listed(lengths)} tokens, over that of the full cache ({baselines}); retrieval of a five-digit code "
        f"hidden in {_listed([context.split()[1] for context in contexts])} tokens of it ({len(DEPTHS)} depths "
        "each): exact answers, and nats per token of the answer. Budgets are shares of the prompt; slots are chosen "
        f"again after every {EVERY} tokens. –: not measured.",
        "",
        "| policy | "
        + " | ".join(f"perplexity after {length}, {n}" for length in lengths for n in names)
        + " | "
        + " | ".join(f"retrieval, {n}" for n in names)
        + " |",
        "|---" * (1 + (len(prompts) + 1) * len(names)) + "|",
    ]
    for policy, scores in policies.items():
        cells = [
            f"{math.exp(scores[prompt][share] - full[prompt][share]) - 1:+.1%}" if prompt in scores else "–"
            for prompt in prompts
            for share in shares
        ]
        found = [retrieved(scores, share) for share in shares if set(contexts) <= set(scores)]
        cells += [f"{e:.0%}, {n:.2f}" for e, n in found] or ["–"] * len(shares)
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def measures(scores: Report, kind: str) -> list[str]:
    """The names of one kind of measure, shortest text first."""
    return sorted((name for name in scores if name.startswith(kind)), key=lambda name: int(name.split()[1]))


def retrieved(scores: Report, share: str) -> tuple[float, float]:
    """Exact answers, and nats per token, over all contexts."""
    parts = [scores[context][share] for context in measures(scores, "retrieval")]
    return float(np.mean([p["exact"] for p in parts])), float(np.mean([p["nats"] for p in parts]))


def speed_table(model: str, contexts: Report) -> list[str]:
    """Time and bytes of one model, a row per policy and two columns per context."""
    lines = [f"## Speed: {model}, budget {BUDGET} slots, batch 1", ""]
    lines += [
        "Milliseconds per token, evictions included, and the ratio to the full cache in the same rounds; megabytes of "
        "cache allocated. –: not measured.",
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
            else "– | – | –"
            for c in columns
        ]
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def draw(report: Report, folder: Path) -> None:
    """``kv-quality.png`` and ``kv-speed.png``."""
    pyplot.switch_backend("Agg")
    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    models = report["quality"]
    columns = max(len(measures(policies["full"], "perplexity")) for policies in models.values()) + 1
    figure, axes = pyplot.subplots(
        len(models), columns, figsize=(5 * columns, 3.6 * len(models)), squeeze=False
    )
    for row, (model, policies) in zip(axes, models.items(), strict=True):
        _draw_quality(row, model, policies)
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    _save(figure, folder / "kv-quality.png")
    for contexts in report["speed"].values():
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6))
        _draw_speed(axes, contexts)
        axes[1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
        _save(figure, folder / "kv-speed.png")


def _draw_quality(axes: Any, model: str, policies: Report) -> None:
    full = policies["full"]
    prompts = measures(full, "perplexity")
    shares = [float(share) for share in full[prompts[0]]]
    for policy, scores in policies.items():
        for axis, prompt in zip(axes, prompts, strict=False):
            if policy != "full" and prompt in scores:
                over = [100 * (math.exp(v - full[prompt][share]) - 1) for share, v in scores[prompt].items()]
                axis.plot(shares, over, label=policy, **_style(policy))
        if policy != "full" and measures(scores, "retrieval"):
            exact = [100 * retrieved(scores, str(share))[0] for share in shares]
            axes[-1].plot(shares, exact, label=policy, **_style(policy))
    axes[-1].axhline(100 * retrieved(full, str(shares[0]))[0], color="black", lw=0.8, ls="--", label="full")
    for axis, prompt in zip(axes, prompts, strict=False):
        tokens = prompt.split()[1]
        axis.set(title=f"{model}, prompt of {tokens}:\nperplexity over full cache, %", ylim=(0, None))
    axes[-1].set(title=f"{model}:\nhidden codes found, %", ylim=(-4, 104))
    for axis in axes[len(prompts) : -1]:
        axis.set_axis_off()
    for axis in (*axes[: len(prompts)], axes[-1]):
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
    """One colour per policy in every chart."""
    if policy in ("full", "random"):
        return {"color": "black" if policy == "full" else "grey", "ls": "--", "marker": "o", "ms": 3}
    colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    return {"color": colours[list(POLICIES).index(policy)], "marker": "o", "ms": 3, "lw": 1.2}


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": ""})
