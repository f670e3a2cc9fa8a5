"""How the kernels of tokopt::bipartite_match are launched."""

import torch
from torch import Tensor

from tokopt.kernels.launch import BLOCK, SCALARS, TILE, WARPS, Build, ceil


def launch(
    build: Build, outputs: tuple[Tensor, ...], metric: Tensor, size: Tensor, r: int, prefix: int
) -> None:
    """The best partner of every a, the ranks of these edges, then the places of all tokens."""
    batch, tokens, channels = metric.shape
    first = (tokens - prefix + 1 - prefix % 2) // 2
    run = build(SCALARS[metric.dtype])
    inverse, best = torch.empty_like(size), size.new_empty((batch, first))
    partner, rank = (torch.empty_like(best, dtype=torch.int32) for _ in range(2))
    run("inverse_norms", (ceil(tokens, WARPS), batch), metric, inverse, tokens, channels)
    sizes = (tokens, channels, prefix)
    run("best_partners", (ceil(first, TILE), batch), metric, size, inverse, best, partner, *sizes)
    run("ranks", (ceil(first, BLOCK), batch), best, rank, first)
    run("place", (ceil(max(first, prefix), BLOCK), batch), rank, partner, *outputs, tokens, r, prefix)
