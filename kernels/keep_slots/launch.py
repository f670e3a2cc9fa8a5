"""How the kernels of tokopt::keep_slots are launched."""

import torch
from torch import Tensor

from tokopt.kernels.launch import BLOCK, SCALARS, Build, ceil


def launch(
    build: Build, outputs: Tensor, score: Tensor, used: Tensor, budget: Tensor, sinks: int, recent: int
) -> None:
    """The priority of every slot, then those of the highest."""
    batch, heads, slots = score.shape
    grid = (ceil(slots, BLOCK), batch * heads)
    run = build(SCALARS[score.dtype])
    priority = torch.empty_like(score, dtype=torch.float32)
    run("priorities", grid, (score, used), (heads, slots, sinks, recent), (priority,))
    run("keep", grid, (priority, used, budget), (heads, slots), (outputs,))
