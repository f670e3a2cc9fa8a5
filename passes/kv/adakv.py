"""Ada-KV: the key heads of a layer share its budget."""

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
class AdaKV(Wrapper):
    """Slots of highest score among all key heads of a layer, ``budget`` times their number (arXiv 2407.11550).

    Every head is sure of the share ``alpha`` of ``budget``, and of the tokens that are always kept. With ``alpha=1`` it
    keeps what ``press`` keeps. The layer's cache is as long as the head that keeps most.
    """

    alpha: float = 0.2

    name: ClassVar[str] = "adakv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise PassError(f"{self.name}: alpha={self.alpha} must be in 0 to 1")
        if not self.heads:
            raise PassError(
                f"{self.name}: all heads of {self.press} keep the same tokens; give it heads=true"
            )

    def keep(self, cached: Cached, priority: Tensor, budget: Tensor) -> Tensor:
        """First what every head is sure of, then the highest of all heads."""
        heads = priority.shape[1]
        sure = super().keep(cached, priority, (budget * self.alpha).long().clamp(min=self.protected))
        ranked = priority.masked_fill(sure, torch.inf).flatten(1)[:, None]
        used = cached.used.expand(-1, heads, -1).flatten(1)
        return ops.keep_slots(ranked, used, budget * heads, 0, 0).unflatten(2, (heads, -1))[:, 0]

    @property
    def uneven(self) -> bool:
        """The budget is the layer's."""
        return True
