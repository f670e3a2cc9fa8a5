"""What a layer of a decoder sees of its cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokopt.kernels import ops


@dataclass(frozen=True)
class Sight:
    """Which earlier tokens a layer sees; 0 for all.

    Those less than ``window`` positions away, or those of the same ``chunk`` of so many positions.
    """

    window: int = 0
    chunk: int = 0

    def causal(self, positions: Tensor) -> Tensor:
        """The mask [tokens, tokens] bool of a text that is read at once, at ``positions`` [tokens]."""
        apart = positions[:, None] - positions
        seen = (apart >= 0) & (apart < self.window) if self.window else apart >= 0
        if not self.chunk:
            return seen
        part = torch.div(positions, self.chunk, rounding_mode="floor")
        return seen & (part[:, None] == part)

    def mask(self, held: Tensor, positions: Tensor, own: Tensor, length: Tensor) -> Tensor:
        """The mask [batch, 1, tokens, slots] bool of new tokens over a cache of the positions ``held``."""
        seen = ops.cache_mask(held, positions, own, length, self.window)
        if not self.chunk:
            return seen
        part = torch.div(positions, self.chunk, rounding_mode="floor")[:, None, :, None]
        return seen & (torch.div(held.mT, self.chunk, rounding_mode="floor") == part)
