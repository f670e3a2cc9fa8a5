"""Progress of long work on stderr: drawn on a terminal, a line per stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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


@contextmanager
def stages(text: str) -> Iterator[Callable[[str], None]]:
    """Say that something slow is under way, and what of it is: beside a clock on a terminal, elsewhere a line each."""
    if not shown():

        def say(line: str) -> None:
            print(f"tokopt: {line}", file=sys.stderr, flush=True)

        say(text)
        yield say
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=_console(), transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda line: progress.update(task, description=line)


@contextmanager
def without_bars() -> Iterator[None]:
    """Have transformers draw no progress bars where nobody would see them move."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def track(items: Iterable[Item], text: str) -> Iterable[Item]:
    """``items``, with a bar that advances as they are taken.

    >>> list(track([1, 2], "Counting"))
    [1, 2]
    """
    if not shown():
        return items
    from rich.progress import track as bar

    return bar(items, text, console=_console(), transient=True)
