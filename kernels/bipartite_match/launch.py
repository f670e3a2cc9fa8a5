"""How the kernels of tokopt::bipartite_match are launched."""

import torch
from torch import Tensor, sym_max

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
    run("inverse_norms", (ceil(tokens, WARPS), batch), (metric,), (tokens, channels), (inverse,))
    grid = (ceil(first, TILE), batch)
    run("best_partners", grid, (metric, size, inverse), (tokens, channels, prefix), (best, partner))
    run("ranks", (ceil(first, BLOCK), batch), (best,), (first,), (rank,))
    grid = (ceil(sym_max(first, prefix), BLOCK), batch)
    run("place", grid, (rank, partner, size), (tokens, r, prefix), outputs)
