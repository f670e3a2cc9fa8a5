"""The table of ``tokopt inspect``: a row per kind of attention."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from tokopt.cli.screen import Cell, si

HEADERS = ("block", "attention", "kind", "tokens", "heads", "FLOPs", "note")


def rows_by_kind(blocks: Sequence[Mapping[str, Any]]) -> list[tuple[Cell, ...]]:
    """A row for all attentions that differ in the numbers of their module path alone, in the order of their first.

    ``blocks`` are :class:`tokopt.analysis.outline.BlockRow` as mappings, and so may come from a file.
    """
    kinds: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for block in blocks:
        pattern = re.sub(r"\d+", "*", block["path"])
        same = tuple(block[key] for key in ("kind", "tokens", "heads", "flops", "note"))
        kinds.setdefault((pattern, *same, block["index"] is None), []).append(block)
    return [
        (
            _spans([block["index"] for block in found if block["index"] is not None]),
            found[0]["path"] if len(found) == 1 else f"{pattern} ({len(found)} of them)",
            kind,
            tokens,
            heads,
            si(flops),
            note,
        )
        for (pattern, kind, tokens, heads, flops, note, _), found in kinds.items()
    ]


def _spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as spans.

    >>> _spans([0, 1, 2, 4])
    '0-2,4'
    """
    spans: list[str] = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        found = [number for _, number in group]
        spans.append(str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}")
    return ",".join(spans)
