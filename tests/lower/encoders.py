"""Small hand-written encoders, captured as bundles."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

import tokopt
from tokopt import Bundle

CHANNELS, HEADS, PATCHES = 32, 4, 20


class Block(nn.Module):
    """A pre-norm block; ``bias`` is added to the attention logits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.up, self.down = nn.Linear(CHANNELS, 2 * CHANNELS), nn.Linear(2 * CHANNELS, CHANNELS)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Vision(nn.Module):
    """``patches`` [batch, patches, 12] -> features of every token and of the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, CHANNELS)
        self.cls = nn.Parameter(torch.randn(1, 1, CHANNELS))
        self.position = nn.Parameter(torch.randn(1, PATCHES + 1, CHANNELS))
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, patches: Tensor) -> dict[str, Tensor]:
        x = torch.cat([self.cls.expand(patches.shape[0], -1, -1), self.embed(patches)], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return {"tokens": x, "pooled": x[:, 0]}


class Text(nn.Module):
    """``input_ids`` and ``attention_mask`` [batch, tokens] (0: padding) -> the mean of the real tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, CHANNELS)
        self.position = nn.Embedding(64, CHANNELS)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.position.weight[: input_ids.shape[1]]
        bias = (1.0 - attention_mask[:, None, None].to(x.dtype)) * -1e9
        for block in self.blocks:
            x = block(x, bias)
        weight = attention_mask[..., None].to(x.dtype)
        return (x * weight).sum(1) / weight.sum(1)


@cache
def vision() -> Bundle:
    """Dynamic batch."""
    torch.manual_seed(0)
    return tokopt.capture(Vision().eval(), (torch.randn(3, PATCHES, 12),))


@cache
def text() -> Bundle:
    """Dynamic batch and tokens."""
    torch.manual_seed(0)
    ids, mask = torch.randint(50, (3, 11)), torch.ones(3, 11, dtype=torch.int64)
    mask[0, 7:] = 0
    axes = ("batch", "tokens")
    ranges = {"tokens": tokopt.AxisRange(1, 64)}
    names = {"input_ids": axes, "attention_mask": axes}
    return tokopt.capture(Text().eval(), (ids, mask), dynamic=names, ranges=ranges)
