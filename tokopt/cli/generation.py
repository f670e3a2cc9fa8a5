"""What the verbs that generate text have in common."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from tokopt.errors import InputError

if TYPE_CHECKING:
    from tokopt.runtime import LanguageModel, Sampling


def add_sampling(parser: ArgumentParser) -> None:
    """How the next token is chosen."""
    for name, default, summary in (
        ("temperature", 0.0, "0 (the default) is greedy"),
        ("top-p", 1.0, "draw from the likeliest tokens of this mass"),
        ("min-p", 0.0, "draw from tokens this likely, relative to the likeliest"),
        ("typical-p", 1.0, "locally typical sampling: mass"),
        ("top-h", 0.0, "Top-H sampling: share of the entropy"),
        ("repetition-penalty", 1.0, "above 1: avoid tokens that were there before"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, metavar="X", help=summary)
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="repeat the same draws")


def read_sampling(args: Namespace) -> Sampling:
    """What the options say; raises InputError for numbers out of range."""
    from tokopt.runtime import Sampling

    return Sampling(
        args.temperature,
        args.top_k,
        args.top_p,
        args.min_p,
        args.typical_p,
        args.top_h,
        args.repetition_penalty,
        args.seed,
    )


def load_language_model(args: Namespace) -> LanguageModel:
    """The language model of an artifact; raises InputError for an artifact of another kind."""
    from tokopt.runtime import LanguageModel, load

    model = load(args.artifact, threads=args.threads, backend=args.backend)
    if not isinstance(model, LanguageModel):
        raise InputError(f"{args.artifact} is no language model; run it with: tokopt run {args.artifact}")
    return model
