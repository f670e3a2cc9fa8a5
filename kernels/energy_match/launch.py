"""How the kernels of tokopt::energy_match are launched."""

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
    """The energies, their ranks, the places of all tokens, then the partners of those that are dropped."""
    keep, drop, dest = outputs
    batch, tokens, channels = metric.shape
    free = tokens - prefix
    run = build(SCALARS[metric.dtype])
    inverse, energy = torch.empty_like(size), size.new_empty((batch, free))
    rank = torch.empty_like(energy, dtype=torch.int32)
    run("inverse_norms", (ceil(tokens, WARPS), batch), (metric,), (tokens, channels), (inverse,))
    scalars = (tokens, channels, prefix, float(margin))
    run("energies", (ceil(free, TILE), batch), (metric, size, inverse), scalars, (energy,))
    run("ranks", (ceil(free, BLOCK), batch), (energy,), (free,), (rank,))
    run("place", (ceil(sym_max(free, prefix), BLOCK), batch), (rank,), (tokens, r, prefix), (keep, drop))
    chosen = (metric, size, inverse, keep, drop)
    run("partners", (ceil(r, TILE), batch), chosen, (tokens, channels, r), (dest,))
