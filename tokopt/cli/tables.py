"""What several verbs print of a program or a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tokopt.cli.screen import Screen, si

if TYPE_CHECKING:
    from tokopt.ir.bundle import Bundle
    from tokopt.ir.program import TensorSpec
    from tokopt.pipeline.base import Observer, PassRecord
    from tokopt.pipeline.manager import Report
    from tokopt.runtime.format.manifest import Tensor


def spell(specs: Sequence[TensorSpec | Tensor]) -> str:
    """Inputs or outputs in one line, ``images: float32[batch, 3, 224, 224]``; states are counted."""
    named = [f"{s.name}: {s.dtype}[{', '.join(map(str, s.axes))}]" for s in specs if s.state is None]
    states = sum(s.state is not None for s in specs)
    return ", ".join([*named, *([f"{states} states"] if states else [])])


def tensor_data(specs: Sequence[TensorSpec | Tensor]) -> list[dict[str, Any]]:
    """Inputs or outputs as ``--json`` gives them."""
    return [dataclasses.asdict(spec) for spec in specs]


def telling(say: Callable[[str], None]) -> Observer:
    """An observer that says of every pass what it changed and how long it took."""

    def tell(record: PassRecord, before: Bundle, after: Bundle) -> None:
        say(f"{record.text}: {record.matches} sites in {record.seconds:.1f} s")

    return tell


def show_report(report: Report, screen: Screen) -> None:
    """A row per pass with what it changed, then its notes and refusals."""
    headers = ("pass", "sites", "tokens at the end", "FLOPs", "bytes", "nodes", "seconds")
    rows = []
    for r in report.records:
        before, after = r.before, r.after
        rows.append(
            (
                r.text,
                r.matches,
                f"{before.tokens[-1]} -> {after.tokens[-1]}" if before.tokens else "",
                f"{si(before.flops)} -> {si(after.flops)}",
                f"{si(before.bytes)} -> {si(after.bytes)}",
                f"{before.nodes} -> {after.nodes}",
                round(r.seconds, 1),
            )
        )
    screen.table(headers, rows)
    for record in report.records:
        for note in (*record.notes, *map(str, record.refusals)):
            screen.line(f"{record.text}: {note}")
