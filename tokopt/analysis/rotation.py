"""What a rotary embedding does to queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """The rotation by position ``p``: ``x[i] cos(p angles[i]) + x[partners[i]] sin(p angles[i])``.

    One entry per channel; angles in radians per position, 0 for a channel that is not rotated (Su et al.,
    arXiv 2104.09864).
    """

    partners: tuple[int, ...]
    angles: tuple[float, ...]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x`` [..., tokens, channels] moved on by ``positions`` [..., tokens], which may be negative."""
        angles = positions[..., None].float() * torch.tensor(self.angles, device=x.device)
        return x * angles.cos() + x[..., list(self.partners)] * angles.sin()

    def mean(self, positions: Tensor) -> Tensor:
        """The mean of the rotations by ``positions`` [batch, positions], as matrices [batch, channels, channels]."""
        channels = torch.eye(len(self.angles), device=positions.device)
        angles = positions[..., None].float() * torch.tensor(self.angles, device=positions.device)
        cos, sin = angles.cos().mean(dim=1), angles.sin().mean(dim=1)
        return cos[..., None] * channels + sin[..., None] * channels[list(self.partners)]
