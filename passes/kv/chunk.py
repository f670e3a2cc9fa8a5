"""Chunks: every part of the text keeps the same fraction of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokopt.errors import PassError
from tokopt.kernels import ops
from tokopt.passes.kv.base import Cached
from tokopt.passes.kv.wrapper import Wrapper


@dataclass(frozen=True)
class Chunk(Wrapper):
    """``press`` chooses the same fraction of every ``length`` positions of the text (ChunkPress of NVIDIA's kvpress).

    A slot's priority is minus its rank in its chunk, over the chunk's tokens in the text: the budget then takes as
    large a part of every chunk. Tokens that are never evicted rank first. Scores are those of the whole text.
    """

    length: int = 1024

    name: ClassVar[str] = "chunk"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 1:
            raise PassError(f"{self.name}: length={self.length} must be positive")

    def priority(self, cached: Cached, budget: Tensor, *memory: Tensor) -> Tensor:
        """Minus the rank of every slot in its chunk, over the tokens of the chunk; guarded."""
        score, used = torch.broadcast_tensors(super().priority(cached, budget, *memory), cached.used)
        chunk = torch.where(used, cached.positions // self.length, -1)
        start = first_of_run(chunk)
        index, slots = torch.arange(used.shape[-1], device=used.device), used.shape[-1]
        order = ops.top_tokens(score.masked_fill(~used, -torch.inf).flatten(0, 1), 0, 0)[0].unflatten(
            0, score.shape[:2]
        )
        grouped = (start.gather(-1, order) * slots + index).sort(dim=-1).values  # by chunk, then by score
        # A chunk's slots are side by side, so they take the same places in either order.
        rank = torch.zeros_like(order).scatter(-1, order.gather(-1, grouped - start * slots), index - start)
        tokens = (cached.newest[:, None, None] + 1 - chunk * self.length).clamp(max=self.length)
        return self.guarded(-(rank / tokens), cached, budget)


def first_of_run(x: Tensor) -> Tensor:
    """For every slot of ``x`` [batch, heads, slots], the first slot of the run of equal values that it is in."""
    index = torch.arange(x.shape[-1], device=x.device)
    begins = torch.cat([torch.ones_like(x[..., :1], dtype=torch.bool), x[..., 1:] != x[..., :-1]], dim=-1)
    firsts = torch.where(begins, index, x.shape[-1]).sort(dim=-1).values
    return firsts.gather(-1, begins.long().cumsum(-1) - 1)
