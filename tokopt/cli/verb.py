"""What a verb of the command consists of."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass

from tokopt.cli.screen import Screen

OK, FAILED, BAD_INPUT = 0, 1, 2
"""What an action returns: done, a check failed, or a part of its input was bad."""


@dataclass(frozen=True)
class Verb:
    """One verb: its line of help, an example of its use, its options, and its action.

    ``run`` does the work, shows it on the screen and returns the exit code. It imports what it needs itself, so that
    the help of every verb needs neither torch nor onnx.
    """

    summary: str
    example: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace, Screen], int]
