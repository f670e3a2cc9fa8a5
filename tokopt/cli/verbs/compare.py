"""``tokopt compare``: how far two models are apart on real inputs, in terms of their task."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from tokopt.cli.models import read_bundle
from tokopt.cli.options import add_colours, add_model, add_samples
from tokopt.cli.screen import Screen
from tokopt.cli.verb import OK, Verb

if TYPE_CHECKING:
    from tokopt.ir.bundle import Bundle


def add_options(parser: ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("other", metavar="MODEL", help="what was made of it")
    add_samples(parser)
    add_colours(parser)


def run(args: Namespace, screen: Screen) -> int:
    """How far two models are apart on real inputs, in terms of their task."""
    from tokopt.cli.inputs import read_samples
    from tokopt.measure.fidelity import fidelity

    with screen.step(f"Comparing {args.artifact} with {args.other}"):
        before, after = read_bundle(args.artifact), read_bundle(args.other)
        found = fidelity(before, after, read_samples(args.inputs, before, args.mean, args.std))
    screen.table(("measure", "value"), [(name, value) for name, value in found.as_dict().items()])
    output = None if before.schedule.generates else _compared(before)
    if output is not None:
        screen.line(f"Of the vectors of {output}, the first output.")
    screen.finish(found.as_dict() | ({} if output is None else {"output": output}))
    return OK


def _compared(bundle: Bundle) -> str:
    """The name of an encoder's first output, which is the one that is compared."""
    outputs = (spec for name in bundle.encoders for spec in bundle.programs[name].outputs)
    return next(spec.name for spec in outputs if spec.role == "output")


VERB = Verb(
    "measure what a pipeline cost, on real inputs: cosine, or KL, top-1 and perplexity",
    "tokopt compare smollm2.bundle.tokopt w4.bundle.tokopt text.txt",
    add_options,
    run,
)
