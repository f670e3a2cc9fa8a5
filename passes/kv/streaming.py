"""StreamingLLM: keep the first tokens and the newest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokopt.passes.kv.base import Cached, KVEviction


@dataclass(frozen=True)
class Streaming(KVEviction):
    """Attention sinks and a window of the newest tokens (arXiv 2309.17453).

    ``budget`` counts both: ``sinks`` plus the window. Tokens keep their positions, unless ``rerotate``: then, as in
    the paper, what is kept is numbered 0, 1, 2, ... anew and its keys are rotated accordingly, so that positions
    never grow beyond those that the model was trained on, and the text may be endless. It needs rotary embeddings,
    one budget for all layers, and refuses models without.
    """

    recent: int = 0
    heads: bool = False
    rerotate: bool = False

    name: ClassVar[str] = "streaming"

    def score(self, cached: Cached, *memory: Tensor) -> Tensor:
        """The newer the better."""
        return -cached.newer.float()

    @property
    def renumbers(self) -> bool:
        """As ``rerotate`` says."""
        return self.rerotate
