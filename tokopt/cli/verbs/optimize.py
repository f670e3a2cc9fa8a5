"""``tokopt optimize``: run a pipeline and save the result as an artifact of target torch."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from tokopt.cli.models import read_bundle
from tokopt.cli.options import SAMPLES, add_colours, add_model, add_output, add_pipeline
from tokopt.cli.screen import Screen
from tokopt.cli.tables import show_report, telling
from tokopt.cli.verb import OK, Verb


def add_options(parser: ArgumentParser) -> None:
    add_model(parser)
    add_pipeline(parser)
    add_output(parser)
    parser.add_argument(
        "--strict", action="store_true", help="exit with 3 when a pass refuses a site or changes nothing"
    )
    parser.add_argument(
        "--calibrate", nargs="+", metavar="FILE", help=f"real inputs for passes that measure: {SAMPLES}"
    )
    add_colours(parser)
    parser.add_argument(
        "--dump", type=Path, metavar="DIR", help="write the program's code there after every pass"
    )
    parser.add_argument(
        "--reproducers", type=Path, metavar="DIR", help="where to write a reproducer when a pass fails"
    )


def run(args: Namespace, screen: Screen) -> int:
    """Run a pipeline and save the result as an artifact of target torch."""
    import tokopt
    from tokopt.cli.inputs import read_samples
    from tokopt.pipeline.base import Context
    from tokopt.pipeline.manager import as_pipeline
    from tokopt.pipeline.observers import dump_to

    pipeline = as_pipeline(args.pipeline)
    with screen.step(f"Reading {args.artifact}") as say:
        given = read_bundle(args.artifact, say=say)
        dumps = (dump_to(args.dump),) if args.dump else ()
        observers = (*dumps, telling(say))
        say(f"Optimising {args.artifact} with {pipeline}")
        samples = read_samples(args.calibrate, given, args.mean, args.std) if args.calibrate else None
        context = Context(args.strict, observers, args.reproducers, samples)
        bundle, report = pipeline.run(given, context)
        path = tokopt.export(bundle, args.output, target="torch", progress=say)
    show_report(report, screen)
    screen.line(f"{path}: {bundle.pipeline} ({bundle.semantics})")
    screen.finish({"artifact": path, "semantics": bundle.semantics, "passes": report.as_dict()["records"]})
    return OK


VERB = Verb(
    "run a pipeline of passes",
    'tokopt optimize dino.tokopt "tome{r=16}" -o merged.tokopt',
    add_options,
    run,
)
