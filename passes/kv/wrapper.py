"""What evictions around another share: they choose by its scores, and its options hold."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from torch import Tensor

from tokopt.analysis.cache import CachedAttention
from tokopt.errors import PassError
from tokopt.passes.kv.base import Cached, KVEviction
from tokopt.pipeline.base import Pass
from tokopt.rewrite.cache import Attention, Memory


@dataclass(frozen=True)
class Wrapper(KVEviction):
    """Base of the passes that evict by the scores of ``press``, which may be such a pass itself.

    Budget, protected tokens and all that every eviction takes are said of ``press``. A subclass says by
    :meth:`priority` what else the order of the slots depends on, or by :meth:`keep` how many slots each head gets.
    """

    budget: int | float | tuple[int, ...] = field(init=False)
    schedule: Literal["uniform", "pyramid"] = field(init=False)
    sinks: int = field(init=False)
    recent: int | float = field(init=False)
    heads: bool = field(init=False)
    every: int = field(init=False)
    press: KVEviction

    def __post_init__(self) -> None:
        Pass.__post_init__(self)
        for shared in fields(KVEviction):
            object.__setattr__(self, shared.name, getattr(self.press, shared.name))
        if self.press.renumbers:
            raise PassError(
                f"{self.name}: {self.press} numbers tokens anew, so their places in the text are lost; "
                "give a press that keeps positions"
            )

    def memory(self, layer: CachedAttention) -> tuple[Memory, ...]:
        """Those of the press."""
        return self.press.memory(layer)

    def observe(self, attention: Attention, *memory: Tensor) -> tuple[Tensor, ...]:
        """As the press does."""
        return self.press.observe(attention, *memory)

    def carry(self, *memory: Tensor) -> tuple[Tensor, ...]:
        """As the press does."""
        return self.press.carry(*memory)

    def priority(self, cached: Cached, budget: Tensor, *memory: Tensor) -> Tensor:
        """That of the press."""
        return self.press.priority(cached, budget, *memory)

    def keep(self, cached: Cached, priority: Tensor, budget: Tensor) -> Tensor:
        """What the press keeps at these priorities."""
        return self.press.keep(cached, priority, budget)

    def merge(self, cached: Cached, kept: Tensor) -> tuple[Tensor, Tensor]:
        """As the press does."""
        return self.press.merge(cached, kept)

    @property
    def needs_rotary(self) -> bool:
        """Whether the press does."""
        return self.press.needs_rotary

    @property
    def uneven(self) -> bool:
        """Whether the press is."""
        return self.press.uneven
