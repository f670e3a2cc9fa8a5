"""How the kernels of tokopt::farthest_point are launched."""

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
    method: str,
) -> None:
    """What the first choice is made by, then all choices by one block per row."""
    batch, tokens, channels = metric.shape
    free, sizes = tokens - prefix, (tokens, channels, prefix)
    run = build(SCALARS[metric.dtype])
    start, nearest = (size.new_empty((batch, free)) for _ in range(2))
    choice = ((tokens, channels, r, prefix), (nearest, *outputs))
    if method == "divprune":
        inverse = torch.empty_like(size)
        run("inverse_norms", (ceil(tokens, WARPS), batch), (metric,), (tokens, channels), (inverse,))
        run("isolation", (ceil(free, TILE), batch), (metric, size, inverse), sizes, (start,))
        run("choose_by_angle", (1, batch), (metric, size, inverse, start), *choice)
    else:
        centre = size.new_empty((batch, channels))
        run("centres", (ceil(channels, BLOCK), batch), (metric, size), sizes, (centre,))
        run("centrality", (ceil(free, WARPS), batch), (metric, size, centre), sizes, (start,))
        run("choose_by_distance", (1, batch), (metric, size, start), *choice)
