"""``tokopt bench``: time artifacts against each other, in turns."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tokopt.cli.options import add_backend, add_batch, add_prompt, add_threads, positive
from tokopt.cli.screen import Screen
from tokopt.cli.verb import OK, Verb
from tokopt.errors import InputError
from tokopt.runtime.format.manifest import read_manifest

if TYPE_CHECKING:
    from tokopt.measure.text_times import TextTimes

ROUNDS, TEXT_ROUNDS = 20, 5
"""Rounds of encoders, and of language models, each of which reads a prompt."""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT")
    parser.add_argument(
        "--rounds",
        type=positive,
        metavar="N",
        help=f"default: {ROUNDS}, for language models {TEXT_ROUNDS}",
    )
    add_batch(parser)
    add_prompt(parser)
    add_threads(parser)
    add_backend(parser)


def run(args: Namespace, screen: Screen) -> int:
    """Time artifacts against each other, in turns."""
    kinds = {read_manifest(Path(path)).schedule.generates for path in args.artifacts}
    if len(kinds) > 1:
        raise InputError("some of the artifacts are language models and some are not; time them apart")
    rounds = args.rounds or (TEXT_ROUNDS if True in kinds else ROUNDS)
    with screen.step(f"Timing {len(args.artifacts)} artifacts, {rounds} rounds"):
        results = _texts(args, rounds) if True in kinds else _encoders(args, rounds)
    (_show_texts if True in kinds else _show_encoders)(results, args, screen)
    if len(results) > 1:
        screen.line("Speed-up: the median, over rounds, of the first artifact's time by this one's.")
    settings = {"rounds": rounds, "batch": args.batch, "threads": args.threads}
    screen.finish(settings | ({"prompt": args.prompt} if True in kinds else {}) | {"results": results})
    return OK


def _encoders(args: Namespace, rounds: int) -> list[dict[str, Any]]:
    from tokopt.measure.timing import interleaved_times

    times = list(interleaved_times(args.artifacts, rounds, args.batch, args.threads, backend=args.backend))
    return [
        {
            "artifact": path,
            "min_ms": 1e3 * min(seconds),
            "median_ms": 1e3 * median(seconds),
            "speedup": median(r[0] / r[index] for r in times),
        }
        for index, path in enumerate(args.artifacts)
        if (seconds := [r[index] for r in times])
    ]


def _show_encoders(results: Sequence[dict[str, Any]], args: Namespace, screen: Screen) -> None:
    rows = [(r["artifact"], r["min_ms"], r["median_ms"], f"{r['speedup']:.2f}x") for r in results]
    screen.table(("artifact", "min ms", "median ms", "speed-up"), rows)


def _texts(args: Namespace, rounds: int) -> list[dict[str, Any]]:
    from tokopt.measure.text_times import TextTimer
    from tokopt.measure.timing import interleaved

    timer = TextTimer(args.prompt, args.batch or 1, args.threads, args.backend)
    times = list(interleaved(args.artifacts, rounds, timer))
    return [
        _text_result(path, [r[0] for r in times], [r[index] for r in times])
        for index, path in enumerate(args.artifacts)
    ]


def _text_result(path: str, first: Sequence[TextTimes], own: Sequence[TextTimes]) -> dict[str, Any]:
    """The medians of an artifact's rounds; ``first`` are those of the artifact that it is compared with."""
    return {
        "artifact": path,
        "ms_per_token": 1e3 * median(times.token for times in own),
        "speedup": median(a.token / b.token for a, b in zip(first, own, strict=True)),
        "read_ms": 1e3 * median(times.read for times in own),
        "cost_by_rows": {
            count: median(times.rows[count] / times.token for times in own) for count in own[0].rows
        },
        "artifact_bytes": sum(file.stat().st_size for file in Path(path).iterdir()),
        "cache_bytes": own[-1].cache_bytes,
        "peak_bytes": own[-1].peak_bytes,
    }


def _show_texts(results: Sequence[dict[str, Any]], args: Namespace, screen: Screen) -> None:
    counts = list(dict.fromkeys(count for r in results for count in r["cost_by_rows"]))
    headers = (
        "artifact",
        "ms/token",
        "speed-up",
        f"ms to read {args.prompt}",
        *(f"x{count}" for count in counts),
        "MB on disk",
        "MB cache",
        "MB at most",
    )
    rows = [
        (
            r["artifact"],
            r["ms_per_token"],
            f"{r['speedup']:.2f}x",
            r["read_ms"],
            *(r["cost_by_rows"].get(count) for count in counts),
            r["artifact_bytes"] / 1e6,
            r["cache_bytes"] / 1e6,
            None if r["peak_bytes"] is None else r["peak_bytes"] / 1e6,
        )
        for r in results
    ]
    screen.table(headers, rows)
    if counts:
        screen.line(
            f"x{counts[0]}: what one call with {counts[0]} new tokens of a text costs, in calls with one of them."
        )


VERB = Verb(
    "time artifacts in turns and print their ratio to the first",
    "tokopt bench plain.tokopt merged.tokopt",
    add_options,
    run,
)
