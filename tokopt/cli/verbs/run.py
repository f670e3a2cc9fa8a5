"""``tokopt run``: run an artifact on files, or on its own example."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path

from tokopt.cli.options import add_artifact, add_backend, add_colours, add_threads
from tokopt.cli.schedule import blocks
from tokopt.cli.screen import Screen
from tokopt.cli.verb import OK, Verb
from tokopt.errors import InputError


def add_options(parser: ArgumentParser) -> None:
    add_artifact(parser)
    parser.add_argument(
        "inputs", nargs="*", metavar="FILE", help="inputs (default: the example stored in the artifact)"
    )
    parser.add_argument(
        "--depth", type=int, metavar="BLOCKS", help="give the outputs after so many blocks, of all rows"
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
    made = runner.run(feed, args.depth)
    outputs = {name: np.asarray(value) for name, value in made.items()}
    depths = left_after(made)
    if args.output is not None:
        _save(args.output, outputs)
    rows = [
        (n, str(v.dtype), str(list(v.shape)), float(v.mean()), float(v.std())) for n, v in outputs.items()
    ]
    screen.table(("output", "dtype", "shape", "mean", "std"), rows)
    if depths:
        screen.line("rows left: " + ", ".join(f"{n} after {blocks(depth)}" for depth, n in depths.items()))
    if args.output is not None:
        screen.line(f"saved to {args.output}")
    keys = ("name", "dtype", "shape", "mean", "std")
    listed = [dict(zip(keys, row, strict=True)) for row in rows]
    screen.finish({"outputs": listed, "depths": depths, "saved": args.output})
    return OK


def left_after(made: Mapping[str, object]) -> dict[int, int]:
    """How many rows left after how many blocks, of a model with exits."""
    import numpy as np

    from tokopt.runtime.encoder import Outputs

    depths = made.depths if isinstance(made, Outputs) else None
    if depths is None:
        return {}
    return dict(zip(*(side.tolist() for side in np.unique(depths, return_counts=True)), strict=True))


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
