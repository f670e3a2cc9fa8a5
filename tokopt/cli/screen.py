"""What the command prints: tables and lines for people, one JSON object for programs, progress on stderr."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec

from tokopt.progress import stages

Cell = str | int | float | None


class Screen:
    """Writes the answer of one verb; with ``as_json`` only :meth:`finish` writes to stdout."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def line(self, text: str = "") -> None:
        """Print a line for people."""
        if not self.as_json:
            print(text)

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Print a table: with rich on a terminal, else in aligned columns that never wrap."""
        if self.as_json or not rows:
            return
        cells = [[_text(cell) for cell in row] for row in rows]
        right = [all(not isinstance(row[i], str) for row in rows) for i in range(len(headers))]
        if sys.stdout.isatty() and find_spec("rich"):
            _rich_table(headers, cells, right)
        else:
            _plain_table(headers, cells, right)

    def step(self, text: str) -> AbstractContextManager[Callable[[str], None]]:
        """Say on stderr that something slow is under way; gives what says which part of it is."""
        return stages(text)

    def finish(self, data: object) -> None:
        """Print the answer as JSON when that was asked for."""
        if self.as_json:
            print(json.dumps(data, indent=1, default=str))


@contextmanager
def warnings_said() -> Iterator[None]:
    """Warnings are lines on stderr when what gave them is over, so that none falls into a text as it is written."""
    with warnings.catch_warnings(record=True) as said:
        try:
            yield
        finally:
            for warning in said:
                print(f"tokopt: warning: {warning.message}", file=sys.stderr)


def si(value: float) -> str:
    """A count with a decimal prefix.

    >>> si(4_620_000_000)
    '4.62 G'
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g}"


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _plain_table(headers: Sequence[str], rows: list[list[str]], right: list[bool]) -> None:
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in [headers, *rows]:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        print("  ".join(padded).rstrip())


def _rich_table(headers: Sequence[str], rows: list[list[str]], right: list[bool]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for header, to_right in zip(headers, right, strict=True):
        table.add_column(header, justify="right" if to_right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
