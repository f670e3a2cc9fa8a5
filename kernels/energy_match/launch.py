"""How the kernels of tokopt::energy_match are launched."""

import torch
from torch import Tensor

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
    """The energies, their ranks, the places of all tokens, then the partners of those that are dropped."""
    keep, drop, dest = outputs
    batch, tokens, channels = metric.shape
    free = tokens - prefix
    run = build(SCALARS[metric.dtype])
    inverse, energy = torch.empty_like(size), size.new_empty((batch, free))
    rank = torch.empty_like(energy, dtype=torch.int32)
    run("inverse_norms", (ceil(tokens, WARPS), batch), metric, inverse, tokens, channels)
    sizes = (tokens, channels, prefix)
    run("energies", (ceil(free, TILE), batch), metric, size, inverse, energy, *sizes, float(margin))
    run("ranks", (ceil(free, BLOCK), batch), energy, rank, free)
    run("place", (ceil(max(free, prefix), BLOCK), batch), rank, keep, drop, tokens, r, prefix)
    chosen = (metric, size, inverse, keep, drop, dest)
    run("partners", (ceil(r, TILE), batch), *chosen, tokens, channels, r)
