"""``tokopt estimate``: run a pipeline in memory and predict what it saves; nothing is written."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from tokopt.cli.models import read_bundle
from tokopt.cli.options import add_model, add_pipeline, add_prompt, add_tokens
from tokopt.cli.schedule import blocks
from tokopt.cli.screen import Screen
from tokopt.cli.tables import show_report, telling
from tokopt.cli.verb import OK, Verb

if TYPE_CHECKING:
    from tokopt.ir.bundle import Bundle
    from tokopt.measure.forecast import TextForecast
    from tokopt.pipeline.manager import Report

_PAYS = 1.05


def add_options(parser: ArgumentParser) -> None:
    add_model(parser)
    add_pipeline(parser)
    add_prompt(parser)
    add_tokens(parser)


def run(args: Namespace, screen: Screen) -> int:
    """Run a pipeline in memory and predict what it saves; nothing is written."""
    from tokopt.measure.forecast import forecast
    from tokopt.measure.machine import measure_machine
    from tokopt.measure.roofline import predict_exits, predict_seconds
    from tokopt.pipeline.base import Context
    from tokopt.pipeline.manager import as_pipeline

    pipeline = as_pipeline(args.pipeline)
    with screen.step(f"Reading {args.artifact}") as say:
        bundle = read_bundle(args.artifact)
        machine = measure_machine()
        seconds: list[float] = []
        texts: list[TextForecast] = []
        stages: list[Bundle] = []

        def predict(made: Bundle) -> None:
            if made.schedule.generates:
                texts.append(forecast(made, machine, args.prompt, args.max_tokens))
            else:
                seconds.append(sum(predict_seconds(made.programs[name], machine) for name in made.encoders))
                stages.append(made)

        say(f"Estimating {pipeline}")
        predict(bundle)
        context = Context(observers=(telling(say), lambda _, __, made: predict(made)))
        report = pipeline.run(bundle, context)[1]
    show_report(report, screen)
    if texts:
        return _predict_texts(texts, report, args, screen)
    exits = predict_exits(stages[-1], machine)
    return _predict(seconds, report, bundle, exits, screen)


def _predict_texts(texts: Sequence[TextForecast], report: Report, args: Namespace, screen: Screen) -> int:
    """A row for the model and for every pass after it, and the verdict."""
    counts = list(texts[0].rows)
    headers = (
        "after",
        "ms/token",
        "speed-up",
        f"ms to read {args.prompt}",
        *(f"x{count}" for count in counts),
        "MB weights",
        "MB cache",
    )
    rows = [
        (
            name,
            1e3 * text.token,
            f"{texts[0].token / text.token:.2f}x",
            1e3 * text.read,
            *(text.rows.get(count) for count in counts),
            text.weight_bytes / 1e6,
            text.cache_bytes / 1e6,
        )
        for name, text in zip(("(nothing)", *(r.text for r in report.records)), texts, strict=True)
    ]
    screen.line()
    screen.table(headers, rows)
    total = texts[0].token / texts[-1].token
    reading = texts[0].read / texts[-1].read
    screen.line(
        f"{_verdict(total)} per token; prompts are read {reading:.2f}x as fast (roofline of this machine's CPU for "
        f"{args.max_tokens} tokens after a prompt of {args.prompt}; tokopt bench measures)"
    )
    records = [
        {**dataclasses.asdict(record), **text.as_dict(), "predicted_speedup": before.token / text.token}
        for record, (before, text) in zip(report.records, pairwise(texts), strict=True)
    ]
    screen.finish(
        {
            "prompt": args.prompt,
            "max_tokens": args.max_tokens,
            "predicted_speedup": total,
            "pays": total >= _PAYS,
            "before": texts[0].as_dict(),
            "after": texts[-1].as_dict(),
            "passes": records,
        }
    )
    return OK


def _predict(
    seconds: list[float], report: Report, bundle: Bundle, exits: dict[int, float], screen: Screen
) -> int:
    """Say what the predicted times before and after every pass mean; ``exits`` are those of rows that leave early."""
    speedups = [before / after for before, after in pairwise(seconds)]
    for record, speedup in zip(report.records, speedups, strict=True):
        screen.line(f"{record.text}: predicted speed-up {speedup:.2f}x")
    total = seconds[0] / seconds[-1]
    sizes = f"the example's sizes {[list(t.shape) for t in bundle.main.example]}"
    who = " for rows that never leave early" if exits else ""
    screen.line(f"{_verdict(total)}{who} (roofline of this machine's CPU at {sizes}; tokopt bench measures)")
    for depth, taken in exits.items():
        speedup = seconds[0] / taken
        needed = max((seconds[-1] - seconds[0]) / (seconds[-1] - taken), 0.0)
        screen.line(
            f"a row that leaves after {blocks(depth)}: {_verdict(speedup)}; it pays where over {needed:.0%} of rows do"
        )
    records = [
        {**dataclasses.asdict(record), "predicted_speedup": speedup}
        for record, speedup in zip(report.records, speedups, strict=True)
    ]
    leaving = {str(depth): seconds[0] / taken for depth, taken in exits.items()}
    result = {"predicted_speedup": total, "pays": total >= _PAYS, "passes": records}
    screen.finish({**result, "predicted_speedup_of_exits": leaving})
    return OK


def _verdict(speedup: float) -> str:
    if speedup >= _PAYS:
        return f"Predicted speed-up {speedup:.2f}x"
    if speedup > 1 / _PAYS:
        return f"No gain to expect: predicted {speedup:.2f}x, within the error of the prediction"
    return f"This would be slower: predicted {speedup:.2f}x, it costs more than it saves"


VERB = Verb(
    "predict what a pipeline saves, before exporting anything",
    'tokopt estimate dino.tokopt "tome{r=16}"',
    add_options,
    run,
)
