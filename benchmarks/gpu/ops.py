"""Kernels against the same ops in plain PyTorch, under torch.compile, and against the bytes that they have to move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.timing import copy_rate, milliseconds
from tokopt.ir.graph import dtype_name
from tokopt.kernels import ops

Row = tuple[str, Callable[[], dict[str, Any]]]
"""What is measured, and what measures it."""

MATCHES = [
    (1, 197, 64),
    (8, 197, 64),
    (64, 197, 64),
    (64, 577, 64),
    (16, 1024, 128),
    (8, 4096, 64),
    (64, 4096, 128),
]
"""Batch, tokens, channels of the metric."""

WIDTH, SHARE = 1024, 8
"""Channels of the merged tokens; one token in so many is merged away."""

ATTENTIONS = [(1, 1, 1024), (1, 1, 8192), (8, 1, 4096), (1, 512, 2048)]
"""Batch, queries, slots; 32 heads of 128 channels over 8 key heads."""


def matches() -> Iterator[Row]:
    """A measurement for every size of :data:`MATCHES` and every dtype."""
    rate = copy_rate()
    for sizes in MATCHES:
        for dtype in DTYPES:
            name = f"{'x'.join(map(str, sizes))} {dtype_name(dtype)}"
            yield name, partial(match_and_merge, *sizes, dtype, rate)


def taps() -> Iterator[Row]:
    """A measurement for every size of :data:`ATTENTIONS`."""
    for sizes in ATTENTIONS:
        yield "x".join(map(str, sizes)), partial(attention_tap, *sizes)


DTYPES = (torch.float32, torch.float16)


def match_and_merge(
    batch: int, tokens: int, channels: int, dtype: torch.dtype, rate: float
) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(0)
    metric = torch.randn(batch, tokens, channels, device="cuda", generator=generator).to(dtype)
    x = torch.randn(batch, tokens, WIDTH, device="cuda", generator=generator).to(dtype)
    size, r = torch.ones(batch, tokens, device="cuda"), tokens // SHARE

    def kernels() -> Any:
        return ops.merge_tokens(x, size, *ops.bipartite_match(metric, size, r, 1))

    match, merge = (_reference(name) for name in ("bipartite_match", "merge_tokens"))

    def plain(metric: Tensor, x: Tensor, size: Tensor) -> Any:
        return merge(x, size, *match(metric, size, r, 1))

    compiled = torch.compile(plain)
    found = milliseconds(
        {
            "kernels, ms": kernels,
            "PyTorch, ms": lambda: plain(metric, x, size),
            "torch.compile, ms": lambda: compiled(metric, x, size),
        }
    )
    moved = metric.numel() + x.numel() * (2 - 1 / SHARE)
    floor = moved * x.element_size() / rate
    row = {"batch": batch, "tokens": tokens, "channels": channels, "dtype": dtype_name(dtype)}
    faster = found["PyTorch, ms"] / found["kernels, ms"]
    return {**row, **found, "times PyTorch": faster, "copy of its bytes, ms": floor}


def attention_tap(batch: int, queries: int, slots: int) -> dict[str, Any]:
    def drawn(heads: int, count: int) -> Tensor:
        return torch.randn(batch, heads, count, 128, device="cuda", dtype=torch.float16)

    query, key, value = drawn(32, queries), drawn(8, slots), drawn(8, slots)
    mask = torch.ones(batch, 1, queries, slots, dtype=torch.bool, device="cuda").tril(slots - queries)
    positions = torch.arange(queries, device="cuda").expand(batch, -1)
    mass = _reference("attention_mass")
    found = milliseconds(
        {
            "attention, ms": lambda: scaled_dot_product_attention(query, key, value, mask, enable_gqa=True),
            "tap, ms": lambda: ops.attention_mass(query, key, mask, positions, 128**-0.5),
            "PyTorch tap, ms": lambda: mass(query, key, mask, positions, 128**-0.5),
        }
    )
    both = (found["attention, ms"] + found["tap, ms"]) / found["attention, ms"]
    return {"batch": batch, "queries": queries, "slots": slots, **found, "with the tap": both}


def _reference(name: str) -> Any:
    return getattr(import_module(f"tokopt.kernels.{name}.reference"), name)
