"""H2O: keep the tokens that got the most attention so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokopt.analysis.cache import CachedAttention
from tokopt.passes.kv.base import Cached, KVEviction
from tokopt.rewrite.cache import Attention, Memory


@dataclass(frozen=True)
class H2O(KVEviction):
    """Heavy hitters: the attention that a token got, summed over all queries so far (arXiv 2306.14048).

    Heads that share keys are summed. The sum of a kept token moves with it. As published, half of the budget is the
    newest tokens; the paper has no sinks (``sinks=0``).
    """

    recent: int | float = 0.5

    name: ClassVar[str] = "h2o"

    def memory(self, layer: CachedAttention) -> tuple[Memory, ...]:
        """The attention mass of every slot."""
        return (mass_memory(layer),)

    def observe(self, attention: Attention, *memory: Tensor) -> tuple[Tensor, ...]:
        """Add what this call's queries attend to."""
        return (memory[0] + attention.mass(),)

    def score(self, cached: Cached, *memory: Tensor) -> Tensor:
        """The accumulated mass."""
        return memory[0][..., 0]


def mass_memory(layer: CachedAttention) -> Memory:
    """One number per key head and slot."""
    return Memory("mass", "float32", ("batch", layer.keys.meta["val"].shape[1], "slots", 1))
