"""StreamingLLM: keep the first tokens and the newest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokopt.passes.eviction import Cached, KVEviction


@dataclass(frozen=True)
class Streaming(KVEviction):
    """Attention sinks and a window of the newest tokens (arXiv 2309.17453).

    ``budget`` counts both: ``sinks`` plus the window. Tokens keep their positions; the paper re-numbers them
    inside the cache, which matters only beyond the positions that the model was trained on.
    """

    recent: int = 0
    heads: bool = False

    name: ClassVar[str] = "streaming"

    def score(self, cached: Cached, *memory: Tensor) -> Tensor:
        """The newer the better."""
        return -cached.newer[:, None].float()
