"""KeyDiff: keep the tokens whose keys differ most from the others'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokopt.kernels.shared import unit
from tokopt.passes.kv.base import Cached, KVEviction


@dataclass(frozen=True)
class KeyDiff(KVEviction):
    """Score ``-cos(k, mean of the normalised keys)`` (arXiv 2504.15364). Needs no queries.

    The paper protects no tokens (``sinks=0 recent=0``).
    """

    name: ClassVar[str] = "keydiff"

    def score(self, cached: Cached, *memory: Tensor) -> Tensor:
        """Minus the cosine of every key and the mean direction of the head's keys in use."""
        direction = unit(cached.keys)
        mean = (direction * cached.used[..., None]).sum(dim=2, keepdim=True)
        return -(direction * unit(mean)).sum(dim=-1)
