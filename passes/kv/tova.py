"""TOVA: drop what the newest token attends to least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokopt.analysis.cache import CachedAttention
from tokopt.passes.kv.base import Cached, KVEviction
from tokopt.rewrite.cache import Attention, Memory


@dataclass(frozen=True)
class TOVA(KVEviction):
    """Token omission via attention (arXiv 2401.06104): the attention of the last query, averaged over heads.

    All heads of a layer keep the same tokens, and nothing is protected. With ``heads`` each key head keeps what its own
    queries attend to.
    """

    sinks: int = 0
    recent: int = 0
    heads: bool = False

    name: ClassVar[str] = "tova"

    def memory(self, layer: CachedAttention) -> tuple[Memory, ...]:
        """The last query's attention to every slot."""
        heads = layer.keys.meta["val"].shape[1] if self.heads else 1
        return (Memory("attended", "float32", ("batch", heads, "slots", 1)),)

    def observe(self, attention: Attention, *memory: Tensor) -> tuple[Tensor, ...]:
        """Attention of the call's last query; a row without one keeps what it had."""
        real = attention.positions >= 0
        index = torch.arange(real.shape[1], device=real.device)
        last = torch.where(real, index, 0).amax(1)[:, None, None, None]

        def row(x: Tensor) -> Tensor:
            return x.gather(2, last.expand(-1, x.shape[1], -1, x.shape[3]))

        places = attention.positions.gather(1, last[:, :, 0, 0])
        newest = Attention(row(attention.query), attention.key, row(attention.mask), places, attention.scale)
        mass = newest.mass()
        if not self.heads:
            mass = mass.sum(dim=1, keepdim=True)
        mass = mass * (mass.shape[1] / attention.query.shape[1])
        return (torch.where((places >= 0)[:, :, None, None], mass, memory[0]),)

    def score(self, cached: Cached, *memory: Tensor) -> Tensor:
        """That attention."""
        return memory[0][..., 0]
