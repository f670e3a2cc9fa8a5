"""``tokopt bench``: time artifacts against each other, in turns."""

from __future__ import annotations

import statistics
from argparse import ArgumentParser, Namespace

from tokopt.cli.options import add_backend, add_batch, add_threads, positive
from tokopt.cli.screen import Screen
from tokopt.cli.verb import OK, Verb


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT")
    parser.add_argument("--rounds", type=positive, default=20, metavar="N", help="default: 20")
    add_batch(parser)
    add_threads(parser)
    add_backend(parser)


def run(args: Namespace, screen: Screen) -> int:
    """Time artifacts against each other, in turns."""
    from tokopt.measure.timing import interleaved_times

    with screen.step(f"Timing {len(args.artifacts)} artifacts, {args.rounds} rounds"):
        rounds = list(
            interleaved_times(args.artifacts, args.rounds, args.batch, args.threads, backend=args.backend)
        )
    results = []
    for index, path in enumerate(args.artifacts):
        seconds = [r[index] for r in rounds]
        results.append(
            {
                "artifact": path,
                "min_ms": 1e3 * min(seconds),
                "median_ms": 1e3 * statistics.median(seconds),
                "speedup": statistics.median(r[0] / r[index] for r in rounds),
            }
        )
    rows = [(r["artifact"], r["min_ms"], r["median_ms"], f"{r['speedup']:.2f}x") for r in results]
    screen.table(("artifact", "min ms", "median ms", "speed-up"), rows)
    if len(results) > 1:
        screen.line("Speed-up: the median, over rounds, of the first artifact's time by this one's.")
    screen.finish({"rounds": args.rounds, "batch": args.batch, "threads": args.threads, "results": results})
    return OK


VERB = Verb(
    "time artifacts in turns and print their ratio to the first",
    "tokopt bench plain.tokopt merged.tokopt",
    add_options,
    run,
)
