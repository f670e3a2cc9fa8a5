"""``tokopt bisect``: the first pass that moves an output by more than the tolerance; exit 1 when there is one."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace

from tokopt.cli.models import read_bundle
from tokopt.cli.options import add_model, add_pipeline
from tokopt.cli.screen import Screen
from tokopt.cli.verb import FAILED, OK, Verb


def add_options(parser: ArgumentParser) -> None:
    add_model(parser)
    add_pipeline(parser)
    parser.add_argument(
        "--tolerance",
        type=float,
        required=True,
        metavar="X",
        help="the largest normalised mean squared error that is fine",
    )


def run(args: Namespace, screen: Screen) -> int:
    """Find the first pass that moves an output by more than the tolerance; exit 1 when there is one."""
    from tokopt.pipeline.bisect import bisect

    with screen.step(f"Bisecting {args.pipeline}"):
        found = bisect(read_bundle(args.artifact), args.pipeline, args.tolerance)
    rows = [
        (step.text, d.output, d.nmse, d.cosine, "" if d.nmse <= found.tolerance else "too far")
        for step in found.steps
        for d in step.differences
    ]
    screen.table(("after", "output", "NMSE", "cosine", ""), rows)
    culprit = found.culprit.text if found.culprit else None
    screen.line(f"first pass above {found.tolerance:g}: {culprit or 'none'}")
    screen.finish({**dataclasses.asdict(found), "culprit": culprit})
    return FAILED if culprit else OK


VERB = Verb(
    "find the first pass after which the outputs differ too much",
    'tokopt bisect dino.tokopt "tome{r=8},evit{keep=0.7 layers=[3]}" --tolerance 0.1',
    add_options,
    run,
)
