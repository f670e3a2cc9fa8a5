"""How the kernels of tokopt::attention_mass are launched."""

import torch
from torch import Tensor

from tokopt.kernels.launch import SCALARS, TILE, Build, ceil


def launch(
    build: Build, outputs: Tensor, query: Tensor, key: Tensor, mask: Tensor, positions: Tensor, scale: float
) -> None:
    """The normalizers of all queries, then the sums over them."""
    batch, heads, queries, channels = query.shape
    _, key_heads, slots, _ = key.shape
    sizes = (heads, key_heads, mask.shape[1], queries, slots, channels)
    run = build(SCALARS[query.dtype])
    top, total = (query.new_empty((batch, heads, queries), dtype=torch.float32) for _ in range(2))
    grid = (ceil(queries, TILE), batch * heads)
    run("normalizers", grid, (query, key, mask), (*sizes, float(scale)), (top, total))
    grid = (ceil(slots, TILE), batch * key_heads)
    run("masses", grid, (query, key, mask, positions, top, total), (*sizes, float(scale)), (outputs,))
