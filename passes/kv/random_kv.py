"""Random eviction: the baseline that every other method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokopt.passes.kv.base import Cached, KVEviction
from tokopt.passes.reduce.random import slot_hash


@dataclass(frozen=True)
class RandomEviction(KVEviction):
    """Keep tokens at random, computed from slot numbers and ``seed`` alone; the same for all layers and heads."""

    heads: bool = False
    seed: int = 0

    name: ClassVar[str] = "random_kv"

    def score(self, cached: Cached, *memory: Tensor) -> Tensor:
        """A hash of the slot's number."""
        slots = cached.used.shape[-1]
        hashed = slot_hash(slots, self.seed, cached.used.device)
        return hashed.expand(cached.used.shape[0], 1, slots)
