"""The ``tokopt`` command: one verb per step from a model to a file that runs.

Exit codes: 0 done, 1 a check failed, 2 wrong usage or bad input, 3 a pass refused in strict mode.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tokopt import __version__
from tokopt.cli.screen import Screen, warnings_said
from tokopt.cli.verb import BAD_INPUT
from tokopt.cli.verbs import VERBS, load_verb
from tokopt.errors import PassRefused, TokoptError
from tokopt.extras import explained

REFUSED, INTERRUPTED = 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Errors of tokopt are one line on stderr."""
    args = command_parser().parse_args(argv)
    try:
        code = _run(args)
        sys.stdout.flush()
        return code
    except TokoptError as error:
        if args.traceback:
            raise
        print(f"tokopt: error: {error}", file=sys.stderr)
        return REFUSED if isinstance(error, PassRefused) else BAD_INPUT
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    """Run a verb; a package that one of the extras brings is named with its extra where it is missing."""
    try:
        with warnings_said():
            return load_verb(args.verb).run(args, Screen(args.json))
    except ModuleNotFoundError as error:
        raise explained(error) or error from error


def command_parser() -> argparse.ArgumentParser:
    """The parser of the whole command, with one subparser per verb."""
    parser = argparse.ArgumentParser(
        prog="tokopt",
        description="Make transformer models do less work per token: capture, optimise, export, run.",
        epilog="exit codes: 0 done, 1 a check failed, 2 wrong usage or bad input, 3 refused in strict mode",
    )
    parser.add_argument("--version", action="version", version=f"tokopt {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in VERBS:
        verb = load_verb(name)
        added = subparsers.add_parser(
            name,
            help=verb.summary,
            description=verb.summary[0].upper() + verb.summary[1:] + ".",
            epilog=f"example:\n  {verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
        added.add_argument("--traceback", action="store_true", help="show where an error was raised")
        verb.add_options(added)
    return parser
