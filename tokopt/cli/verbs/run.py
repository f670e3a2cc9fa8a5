"""``tokopt run``: run an artifact on files, or on its own example."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from tokopt.cli.options import add_artifact, add_backend, add_colours, add_threads
from tokopt.cli.screen import Screen
from tokopt.cli.verb import OK, Verb
from tokopt.errors import InputError


def add_options(parser: ArgumentParser) -> None:
    add_artifact(parser)
    parser.add_argument(
        "inputs", nargs="*", metavar="FILE", help="inputs (default: the example stored in the artifact)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="save to .npy or .npz")
    add_colours(parser)
    add_threads(parser)
    add_backend(parser)


def run(args: Namespace, screen: Screen) -> int:
    """Run an artifact on files, or on its own example."""
    import numpy as np

    from tokopt.cli.inputs import read_inputs
    from tokopt.measure.timing import open_runner

    runner = open_runner(args.artifact, args.threads, args.backend)
    feed = (
        read_inputs(args.inputs, runner.program.inputs, args.mean, args.std)
        if args.inputs
        else runner.example()
    )
    outputs = {name: np.asarray(value) for name, value in runner.run(feed).items()}
    if args.output is not None:
        _save(args.output, outputs)
    rows = [
        (n, str(v.dtype), str(list(v.shape)), float(v.mean()), float(v.std())) for n, v in outputs.items()
    ]
    screen.table(("output", "dtype", "shape", "mean", "std"), rows)
    if args.output is not None:
        screen.line(f"saved to {args.output}")
    keys = ("name", "dtype", "shape", "mean", "std")
    screen.finish({"outputs": [dict(zip(keys, row, strict=True)) for row in rows], "saved": args.output})
    return OK


def _save(path: Path, outputs: dict) -> None:
    """One output as ``.npy``, any number as ``.npz``; the file is written whole or not at all."""
    import numpy as np

    from tokopt.place import writing

    if path.suffix not in (".npy", ".npz"):
        raise InputError(f"{path} must end in .npy (one output) or .npz")
    if path.suffix == ".npy" and len(outputs) > 1:
        raise InputError(f"the program has {len(outputs)} outputs ({', '.join(outputs)}); save them as .npz")
    with writing(path) as partial, partial.open("wb") as stream:
        if path.suffix == ".npy":
            np.save(stream, next(iter(outputs.values())))
        else:
            np.savez(stream, **outputs)


VERB = Verb(
    "run an artifact on .npy, .npz or image files",
    "tokopt run vit.tokopt photo.jpg -o features.npz",
    add_options,
    run,
)
