"""Progress of long work: on stderr, and only where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import TypeVar

Item = TypeVar("Item")


def shown() -> bool:
    """Whether there is anybody to show progress to."""
    return sys.stderr.isatty() and find_spec("rich") is not None


@cache
def _console():
    """One for all, so that a bar within a spinner is drawn below it."""
    from rich.console import Console

    return Console(stderr=True)


def spinner(text: str) -> AbstractContextManager[object]:
    """Says that something slow is under way, and for how long it has been."""
    if not shown():
        return nullcontext()
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    progress = Progress(*columns, console=_console(), transient=True)
    progress.add_task(text, total=None)
    return progress


def track(items: Iterable[Item], text: str) -> Iterable[Item]:
    """``items``, with a bar that advances as they are taken.

    >>> list(track([1, 2], "Counting"))
    [1, 2]
    """
    if not shown():
        return items
    from rich.progress import track as bar

    return bar(items, text, console=_console(), transient=True)
