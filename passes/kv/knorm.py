"""Knorm: keep the tokens whose keys are short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokopt.passes.kv.base import Cached, KVEviction
from tokopt.rewrite.cache import in_float32


@dataclass(frozen=True)
class KNorm(KVEviction):
    """Score ``-|k|`` of the cached key (arXiv 2406.11430): short keys get much attention. Needs no queries.

    The paper protects no tokens (``sinks=0 recent=0``).
    """

    name: ClassVar[str] = "knorm"

    def score(self, cached: Cached, *memory: Tensor) -> Tensor:
        """Minus the Euclidean length of every key."""
        return -torch.linalg.vector_norm(in_float32(cached.keys), dim=-1)
