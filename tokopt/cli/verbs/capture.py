"""``tokopt capture``: a model becomes an artifact of target torch."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from tokopt.cli.models import ExampleOptions, read_bundle
from tokopt.cli.options import MODEL, add_output, shape
from tokopt.cli.screen import Screen
from tokopt.cli.tables import spell, tensor_data
from tokopt.cli.verb import OK, Verb


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    add_output(parser)
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels per side of the example images")
    parser.add_argument("--tokens", type=int, metavar="N", help="length of the example text (default: 32)")
    parser.add_argument(
        "--shape",
        type=shape,
        action="append",
        default=[],
        metavar="2,3,224,224",
        help="shape of a random float32 example for a factory that returns none; once per input",
    )
    parser.add_argument(
        "--class", dest="model_class", metavar="NAME", help="class of transformers (default: AutoModel)"
    )


def run(args: Namespace, screen: Screen) -> int:
    """MODEL -> an artifact of target torch."""
    import tokopt

    options = ExampleOptions(args.image_size, args.tokens, tuple(args.shape), args.model_class)
    with screen.step(f"Capturing {args.model}") as say:
        bundle = read_bundle(args.model, options, say)
        path = tokopt.export(bundle, args.output, target="torch", progress=say)
    program = bundle.main
    screen.line(f"{path}: {spell(program.inputs)} -> {spell(program.outputs)}")
    screen.finish(
        {"artifact": path, "inputs": tensor_data(program.inputs), "outputs": tensor_data(program.outputs)}
    )
    return OK


VERB = Verb(
    "turn a model into an artifact that the other verbs read",
    "tokopt capture ./dinov2-small -o dino.tokopt",
    add_options,
    run,
)
