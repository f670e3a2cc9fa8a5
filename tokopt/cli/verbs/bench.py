"""``tokopt bench``: time artifacts against each other, in turns."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tokopt.cli.options import add_backend, add_batch, add_prompt, add_threads, add_tokens, positive, shape
from tokopt.cli.screen import Screen
from tokopt.cli.verb import OK, Verb
from tokopt.errors import InputError
from tokopt.runtime.format.manifest import read_manifest

if TYPE_CHECKING:
    from tokopt.measure.text_times import TextTimes

ROUNDS, TEXT_ROUNDS, ROWS_ROUNDS = 20, 5, 9
"""Rounds of encoders, of language models, each of which reads a prompt, and of calls by their new tokens."""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT")
    parser.add_argument(
        "--rounds",
        type=positive,
        metavar="N",
        help=f"default: {ROUNDS}, for language models {TEXT_ROUNDS}",
    )
    parser.add_argument(
        "--rows",
        type=shape,
        metavar="N,N,...",
        help="time calls of a language model with so many new tokens of a text, in every form that runs here",
    )
    add_batch(parser)
    add_prompt(parser)
    add_tokens(parser)
    add_threads(parser)
    add_backend(parser)


def run(args: Namespace, screen: Screen) -> int:
    """Time artifacts against each other, in turns."""
    kinds = {read_manifest(Path(path)).schedule.generates for path in args.artifacts}
    if len(kinds) > 1:
        raise InputError("some of the artifacts are language models and some are not; time them apart")
    if args.rows:
        return _rows(args, screen, True in kinds)
    rounds = args.rounds or (TEXT_ROUNDS if True in kinds else ROUNDS)
    with screen.step(f"Timing {', '.join(args.artifacts)}: {rounds} rounds"):
        results = _texts(args, rounds) if True in kinds else _encoders(args, rounds)
    (_show_texts if True in kinds else _show_encoders)(results, args, screen)
    if len(results) > 1:
        screen.line("Speed-up: the median, over rounds, of the first artifact's time by this one's.")
    if args.backend == "onnxruntime":
        for result in results:
            result["kernels"] = _kernels(result["artifact"])
            screen.line(f"{result['artifact']}: CPU kernels of tokopt: {result['kernels']}")
    settings = {"rounds": rounds, "batch": args.batch, "threads": args.threads}
    screen.finish(
        settings
        | ({"prompt": args.prompt, "max_tokens": args.max_tokens} if True in kinds else {})
        | {"results": results}
    )
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
    for path in args.artifacts:
        if left := _left(path):
            screen.line(
                f"{path}: its stored inputs leave after so many blocks: {left}; others take other times."
            )


def _left(path: str) -> str:
    """Where the rows of the stored inputs leave a model with exits; empty for one without."""
    from tokopt.measure.timing import open_runner
    from tokopt.runtime.encode import exit_depths

    if not exit_depths(read_manifest(Path(path))):
        return ""
    runner = open_runner(path)
    found: Any = runner.run(runner.example())
    return ", ".join(map(str, found.depths))


def _texts(args: Namespace, rounds: int) -> list[dict[str, Any]]:
    from tokopt.measure.text_times import TextTimer
    from tokopt.measure.timing import interleaved

    timer = TextTimer(args.prompt, args.batch or 1, args.threads, args.backend, args.max_tokens)
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


# --- by the number of new tokens ----------------------------------------------------------------------------


def _rows(args: Namespace, screen: Screen, texts: bool) -> int:
    """The cost of a call by the number of its new tokens, for every artifact and form."""
    from tokopt.measure.text_times import FormTimer
    from tokopt.measure.timing import in_turns
    from tokopt.runtime.machine import describe_machine

    if not texts or args.backend != "onnxruntime" or args.batch not in (None, 1):
        raise InputError(
            "--rows counts the new tokens of one text of a language model on ONNX Runtime; leave out --rows, or "
            "--backend and --batch, or name language models"
        )
    rounds = args.rounds or ROWS_ROUNDS
    jobs = [(path, form) for path in args.artifacts for form in _forms(path)]
    timers = [(path, FormTimer(form, args.rows, args.prompt, args.threads)) for path, form in jobs]
    with screen.step(f"Timing {len(jobs)} forms, {rounds} rounds"):
        times = list(in_turns(timers, rounds))
    machine = describe_machine(args.threads)
    results = [
        _row_result(path, form, [turn[index] for turn in times], machine)
        for index, (path, form) in enumerate(jobs)
    ]
    counts = list(dict.fromkeys(count for r in results for count in r["ms"]))
    rows = [(r["artifact"], r["form"], *(_cost(r, count) for count in counts)) for r in results]
    screen.table(
        ("artifact", "form", *(f"{count} tokens" if count > 1 else "1 token" for count in counts)), rows
    )
    screen.line("ms of one call, and what it costs in calls with the fewest new tokens.")
    screen.finish(
        {
            "rounds": rounds,
            "threads": args.threads,
            "prompt": args.prompt,
            "machine": machine,
            "kernels": {path: _kernels(path) for path in args.artifacts},
            "results": results,
        }
    )
    return OK


def _forms(path: str) -> tuple[str, ...]:
    """The forms of the program that decodes which run here."""
    from tokopt.runtime.engines.onnxruntime import Sessions

    folder = Path(path)
    manifest = read_manifest(folder)
    entry = manifest.schedule.entry("decode")
    assert entry is not None
    sessions = Sessions(folder, manifest)
    first, *others = (sessions.forms(name) for name in entry.programs)
    return tuple(form for form in first if all(form in forms for forms in others))


def _kernels(path: str) -> str:
    """What is used here of tokopt's own CPU kernels."""
    from tokopt.runtime.engines.kernels import choose_kernels

    return str(choose_kernels(read_manifest(Path(path))))


def _row_result(
    path: str, form: str, times: Sequence[dict[int, float]], machine: dict[str, object]
) -> dict[str, Any]:
    """The medians of a form's rounds."""
    from tokopt.runtime.rows import RowCosts

    costs = RowCosts.of(times, machine)
    return {
        "artifact": path,
        "form": form,
        "ms": {count: 1e3 * seconds for count, seconds in costs.seconds.items()},
        "ratio": {count: costs.ratio(count) for count in costs.seconds},
    }


def _cost(result: dict[str, Any], count: int) -> str:
    if count not in result["ms"]:
        return "-"
    return f"{result['ms'][count]:.3g} ({result['ratio'][count]:.2f}x)"


VERB = Verb(
    "time artifacts in turns and print their ratio to the first",
    "tokopt bench plain.tokopt merged.tokopt",
    add_options,
    run,
)
