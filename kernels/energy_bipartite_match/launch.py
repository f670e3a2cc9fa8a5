"""How the kernels of tokopt::energy_bipartite_match are launched."""

import torch
from torch import Tensor, sym_max

from tokopt.kernels.launch import BLOCK, SCALARS, TILE, WARPS, Build, ceil


def launch(
    build: Build,
    outputs: tuple[Tensor, ...],
    metric: Tensor,
    size: Tensor,
    r: int,
    prefix: int,
    margin: float,
) -> None:
    """The energies and their ranks, by which tokens take sides; then the best edges, their ranks and all places."""
    batch, tokens, channels = metric.shape
    free = tokens - prefix
    count, others = (free + 1) // 2, free // 2
    run = build(SCALARS[metric.dtype])
    inverse, energy = torch.empty_like(size), size.new_empty((batch, free))
    rank = torch.empty_like(energy, dtype=torch.int32)
    a, b = (size.new_empty((batch, n), dtype=torch.int64) for n in (count, others))
    best = torch.empty_like(a, dtype=torch.float32)
    partner, edge = (torch.empty_like(a, dtype=torch.int32) for _ in range(2))
    run("inverse_norms", (ceil(tokens, WARPS), batch), (metric,), (tokens, channels), (inverse,))
    scalars = (tokens, channels, prefix, float(margin))
    run("energies", (ceil(free, TILE), batch), (metric, size, inverse), scalars, (energy,))
    run("ranks", (ceil(free, BLOCK), batch), (energy,), (free,), (rank,))
    run("sides", (ceil(free, BLOCK), batch), (rank,), (free, prefix), (a, b))
    inputs = (metric, size, inverse, a, b)
    run(
        "best_partners",
        (ceil(count, TILE), batch),
        inputs,
        (tokens, channels, count, others),
        (best, partner),
    )
    run("ranks", (ceil(count, BLOCK), batch), (best,), (count,), (edge,))
    grid = (ceil(sym_max(count, prefix), BLOCK), batch)
    run("place", grid, (edge, partner, a, b, size), (tokens, count, others, r, prefix), outputs)
