"""``tokopt tune``: search a pipeline; exit 1 when none gains."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from tokopt.cli.models import imported, read_bundle
from tokopt.cli.options import (
    add_batch,
    add_colours,
    add_model,
    add_output,
    add_prompt,
    add_samples,
    add_threads,
)
from tokopt.cli.screen import Screen
from tokopt.cli.verb import FAILED, OK, Verb


def add_options(parser: ArgumentParser) -> None:
    add_model(parser)
    add_samples(parser)
    add_output(parser)
    parser.add_argument("--floor", default="", metavar="F", help="default: cosine>=0.99, or KL<=0.05")
    parser.add_argument(
        "--metric",
        metavar="module:function",
        help='a measure of your own, of an artifact\'s folder: --metric mine:accuracy --floor "metric>=0.8"',
    )
    parser.add_argument(
        "--candidates",
        action="append",
        default=[],
        nargs="+",
        metavar="PIPELINE",
        help="methods of one kind, of which a pipeline takes one; give it once per kind",
    )
    parser.add_argument(
        "--minutes", type=float, default=30.0, metavar="N", help="no trial begins later (default: 30)"
    )
    add_prompt(parser)
    add_batch(parser)
    add_threads(parser)
    add_colours(parser)


def run(args: Namespace, screen: Screen) -> int:
    """Search a pipeline; exit 1 when none gains."""
    from tokopt.cli.inputs import read_samples
    from tokopt.measure.tuning import Machine, tune

    with screen.step(f"Reading {args.artifact}") as say:
        bundle = read_bundle(args.artifact)
        found = tune(
            bundle,
            read_samples(args.inputs, bundle, args.mean, args.std),
            args.output,
            floor=args.floor,
            candidates=args.candidates,
            metric=imported(args.metric) if args.metric else None,
            minutes=args.minutes,
            machine=Machine(args.threads, args.prompt, args.batch),
            progress=say,
        )
    measures = next((list(t.quality) for t in found.trials if t.quality), [])
    rows = [
        (
            trial.text,
            f"{trial.speedup:.2f}x" if trial.speedup else "",
            "{:.2f} to {:.2f}".format(*trial.quartiles) if trial.quartiles else "",
            trial.milliseconds,
            *(trial.quality.get(measure) for measure in measures),
            trial.megabytes,
            trial.reason or ("best" if trial is found.winner else "front" if trial in found.front else ""),
        )
        for trial in found.trials
    ]
    screen.table(("pipeline", "speed-up", "quartiles", "ms", *measures, "MB", ""), rows)
    if found.untried:
        screen.line(f"{len(found.untried)} candidates were left for want of time; the same command goes on.")
    if found.winner is None:
        found_none = f"No gain: nothing reaches {found.floor} and is faster than the model itself."
        screen.line(found_none if found.trials else "Nothing was tried; give more --minutes.")
    else:
        screen.line(f"{found.winner.pipeline}  ({args.output}/best.tokopt)")
        if found.winner.drafter:
            screen.line(f"tokopt generate {args.output}/best.tokopt PROMPT --drafter {found.winner.drafter}")
    screen.finish(found.as_dict())
    return OK if found.winner else FAILED


VERB = Verb(
    "search the fastest pipeline of sufficient quality on this machine",
    'tokopt tune dino.bundle.tokopt photos/*.jpg -o tuned --floor "cosine>=0.99" --minutes 20',
    add_options,
    run,
)
