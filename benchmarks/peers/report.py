"""The tables of ``peers.md``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.decode import TOKENS

CEILINGS = (0.01, 0.1)
"""KL divergences at which tokopt's fastest engine is set against the fastest peer."""

FLOORS = (0.99, 0.97)
"""Cosines at which tokopt's fastest engine is set against the fastest peer."""

WEIGHTS = (
    "The float32 weights were themselves expanded from a file of 4-bit blocks. KL is the divergence of the next token",
    "from that of these weights, on texts that calibration has not seen; transformers computes with these weights.",
)

SPEED = (
    "Speed is the median of the ratios to turns of the first engine right before and after an engine's own; it is what "
    "engines are compared by."
)

Timings = Sequence[Mapping[str, Any]]


def markdown(report: Mapping[str, Any]) -> str:
    """All that was measured, as text."""
    lines = ["# tokopt against other engines", ""]
    lines += [*_vision(report), *_language(report), *_limits(report)]
    return "\n".join([*lines, "```json", json.dumps(report["machine"], indent=1), "```", ""])


def fastest_ratio(
    timings: Timings, quality: Mapping[str, Any], floor: float
) -> tuple[str, str, float] | None:
    """tokopt's fastest engine and the fastest peer of at least that cosine, and the ratio of their times."""
    return _fastest_of_each([t for t in timings if quality[t["name"]].get("cosine", 0.0) >= floor])


def _fastest_of_each(good: Timings) -> tuple[str, str, float] | None:
    """Among engines of equal merit: tokopt's fastest, the fastest peer, and the ratio of their times."""
    ours = [t for t in good if t["name"].startswith("tokopt")]
    peers = [t for t in good if not t["name"].startswith("tokopt")]
    if not ours or not peers:
        return None
    best, peer = fastest(ours), fastest(peers)
    return best["name"], peer["name"], best["ratio_median"] / peer["ratio_median"]


def fastest(timings: Timings) -> Mapping[str, Any]:
    """By the ratio to the control's turns beside an engine's own: seconds hang on when the machine was slower."""
    return max(timings, key=lambda t: t["ratio_median"])


def _vision(report: Mapping[str, Any]) -> list[str]:
    quality = report.get("vision/quality")
    if not quality:
        return []
    batches = {
        key.rsplit("/", 1)[1]: value for key, value in report.items() if key.startswith("vision/time/")
    }
    heads = "".join(f" batch {batch}: ms | at its fastest | speed (quartiles) |" for batch in batches)
    lines = ["## DINOv2 ViT-S/14, 224 px", "", SPEED, "", f"| engine | cosine | smallest |{heads}"]
    lines.append("|---" * (3 + 3 * len(batches)) + "|")
    for name, values in quality.items():
        if "reason" in values:
            continue
        cells = [f"{values['cosine']:.4f}", f"{values['smallest']:.4f}"]
        for timings in batches.values():
            row = next((t for t in timings if t["name"] == name), None)
            cells.append(
                f"{1e3 * row['median']:.1f} | {1e3 * row['minimum']:.1f} | {_speed(row)}"
                if row
                else "– | – | –"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    for batch, timings in batches.items():
        for floor in floors(timings, quality):
            if found := fastest_ratio(timings, quality, floor):
                ours, peer, ratio = found
                lines.append(
                    f"- Batch {batch}, cosine at least {floor:.4g}: {ours} is {ratio:.2f}x as fast as {peer}."
                )
    lines += _left_out({name: values["reason"] for name, values in quality.items() if "reason" in values})
    return [*lines, ""]


def _speed(timing: Mapping[str, Any]) -> str:
    low, high = timing["ratio_quartiles"]
    return f"{timing['ratio_median']:.2f} ({low:.2f} to {high:.2f})"


def _left_out(reasons: Mapping[str, str]) -> list[str]:
    """One line for all that are left out for the same reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"- Left out: {'; '.join(each)}: {reason}" for reason, each in names.items()]


def floors(timings: Timings, quality: Mapping[str, Any]) -> list[float]:
    """Cosines to compare at: that of the fastest peer that is good enough at all, then the fixed ones."""
    peers = [t for t in timings if not t["name"].startswith("tokopt")]
    good = [t for t in peers if quality[t["name"]].get("cosine", 0.0) >= min(FLOORS)]
    own = [quality[fastest(good)["name"]]["cosine"]] if good else []
    return [*own, *FLOORS]


def _language(report: Mapping[str, Any]) -> list[str]:
    parts = {
        key: value for key, value in report.items() if key.startswith(("language/decode", "language/read"))
    }
    if not parts:
        return []
    lines = ["## SmolLM2-135M-Instruct", ""]
    lines += [*WEIGHTS, "", SPEED, ""]
    quality = report.get("language/quality", {})
    for key, timings in parts.items():
        _, what, prompt = key.split("/")
        tokens = TOKENS if what == "decode" else int(prompt)
        calls = TOKENS if what == "decode" else 1
        title = f"Decoding after {prompt} tokens" if what == "decode" else f"Reading {prompt} tokens"
        lines += [
            f"### {title}",
            "",
            "| engine | KL | tokens/s | at its fastest | ms | speed (quartiles) |",
            "|---|---|---|---|---|---|",
        ]
        for t in timings:
            rate, best = tokens / t["median"], tokens / t["minimum"]
            kl = quality.get(t["name"], {}).get("KL")
            cell = "–" if kl is None else f"{kl:.3f}"
            lines.append(
                f"| {t['name']} | {cell} | {rate:.1f} | {best:.1f} | {1e3 * t['median'] / calls:.1f} | {_speed(t)} |"
            )
        peer = fastest([t for t in timings if not t["name"].startswith("tokopt")])
        ratios = [
            f"{t['name']} {t['ratio_median'] / peer['ratio_median']:.2f}x"
            for t in timings
            if t["name"].startswith("tokopt")
        ]
        lines += ["", f"Against the fastest peer ({peer['name']}): " + ", ".join(ratios) + ".", ""]
        for ceiling in CEILINGS:
            good = [t for t in timings if _divergence(t["name"], quality) <= ceiling]
            if found := _fastest_of_each(good):
                ours, peer, ratio = found
                lines.append(f"- KL at most {ceiling:.4g}: {ours} is {ratio:.2f}x as fast as {peer}.")
        lines.append("")
    lines += _left_out(report.get("language/missing", {}))
    return [*lines, ""]


def _divergence(name: str, quality: Mapping[str, Any]) -> float:
    """KL from the float32 model: 0 for transformers, which computes that; infinite where it was not measured."""
    return 0.0 if name == "transformers" else quality.get(name, {}).get("KL", float("inf"))


def _limits(report: Mapping[str, Any]) -> list[str]:
    rates = report.get("limits/rates")
    if not rates:
        return []
    lines = ["## Limits", "", *(f"- {name}: {value:.1f}" for name, value in rates.items()), ""]
    lines += [
        "| step | bytes to read | floor, ms | measured, ms | where the time goes, ms |",
        "|---|---|---|---|---|",
    ]
    for key, value in report.items():
        if not key.startswith("limits/step/"):
            continue
        _, _, method, prompt = key.split("/")
        floor = value["bytes"] / rates["read, GB/s"] / 1e6
        row = next(
            (t for t in report.get(f"language/decode/{prompt}", ()) if t["name"] == f"tokopt {method}"), None
        )
        measured = f"{1e3 * row['median'] / TOKENS:.1f}" if row else "–"
        spent = ", ".join(f"{name} {ms:.1f}" for name, ms in list(value["profile"].items())[:5])
        lines.append(
            f"| {method}, prompt {prompt} | {value['bytes'] / 1e6:.0f} MB | {floor:.1f} | {measured} | {spent} |"
        )
    return [*lines, ""]
