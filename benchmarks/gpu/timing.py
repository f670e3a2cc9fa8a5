"""Times by device events: every candidate in turns, medians over rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

ROUNDS, CALLS, WARM_UP = 15, 10, 3

FLUSHED, COPIED = 256 << 20, 1 << 30
"""Bytes that are written between two turns, more than a cache holds, and that are copied for the rate of copying."""


def milliseconds(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of one call of each, interleaved; the caches of the device are flushed before every turn."""
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    for call in candidates.values():
        for _ in range(WARM_UP):
            call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(ROUNDS):
        names = list(candidates) if number % 2 == 0 else list(candidates)[::-1]
        for name in names:
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                candidates[name]()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / CALLS)
    return {name: statistics.median(found) for name, found in times.items()}


def copy_rate() -> float:
    """Bytes per millisecond that a large copy moves, reading and writing."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds({"copy": lambda: target.copy_(source)})["copy"]
