"""``tokopt estimate``: run a pipeline in memory and predict what it saves; nothing is written."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace
from itertools import pairwise
from typing import TYPE_CHECKING

from tokopt.cli.models import read_bundle
from tokopt.cli.options import add_model, add_pipeline
from tokopt.cli.screen import Screen
from tokopt.cli.tables import show_report
from tokopt.cli.verb import OK, Verb

if TYPE_CHECKING:
    from tokopt.ir.bundle import Bundle
    from tokopt.pipeline.manager import Report

_PAYS = 1.05


def add_options(parser: ArgumentParser) -> None:
    add_model(parser)
    add_pipeline(parser)


def run(args: Namespace, screen: Screen) -> int:
    """Run a pipeline in memory and predict what it saves; nothing is written."""
    from tokopt.measure.roofline import measure_machine, predict_seconds
    from tokopt.pipeline.base import Context
    from tokopt.pipeline.manager import as_pipeline

    pipeline, seconds = as_pipeline(args.pipeline), list[float]()
    with screen.step(f"Estimating {pipeline}"):
        bundle, watch = read_bundle(args.artifact), Context()
        if not bundle.schedule.generates:
            machine = measure_machine()
            seconds.append(predict_seconds(bundle.main, machine))
            watch = Context(
                observers=(lambda _, __, new: seconds.append(predict_seconds(new.main, machine)),)
            )
        report = pipeline.run(bundle, watch)[1]
    show_report(report, screen)
    if bundle.schedule.generates:
        # What a step costs depends on how full its cache is, and on what an engine fuses with 4-bit weights.
        screen.line("No time is predicted for language models; tokopt generate says what a text took")
        screen.finish({"passes": [dataclasses.asdict(record) for record in report.records]})
        return OK
    return _predict(seconds, report, bundle, screen)


def _predict(seconds: list[float], report: Report, bundle: Bundle, screen: Screen) -> int:
    """Say what the predicted times before and after every pass mean."""
    speedups = [before / after for before, after in pairwise(seconds)]
    for record, speedup in zip(report.records, speedups, strict=True):
        screen.line(f"{record.text}: predicted speed-up {speedup:.2f}x")
    total = seconds[0] / seconds[-1]
    sizes = f"the example's sizes {[list(t.shape) for t in bundle.main.example]}"
    screen.line(f"{_verdict(total)} (roofline of this machine's CPU at {sizes}; tokopt bench measures)")
    records = [
        {**dataclasses.asdict(record), "predicted_speedup": speedup}
        for record, speedup in zip(report.records, speedups, strict=True)
    ]
    screen.finish({"predicted_speedup": total, "pays": total >= _PAYS, "passes": records})
    return OK


def _verdict(speedup: float) -> str:
    if speedup >= _PAYS:
        return f"Predicted speed-up {speedup:.2f}x"
    if speedup > 1 / _PAYS:
        return f"No gain to expect: predicted {speedup:.2f}x, within the error of the prediction"
    return f"This would be slower: predicted {speedup:.2f}x, matching costs more than the removed tokens"


VERB = Verb(
    "predict what a pipeline saves, before exporting anything",
    'tokopt estimate dino.tokopt "tome{r=16}"',
    add_options,
    run,
)
