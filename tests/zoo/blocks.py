"""Hand-written transformers: what users write themselves, in the spellings that capture must understand."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """Images [batch, 3, size, size] -> tokens [batch, 1 + patches, hidden], class token first."""

    def __init__(self, size: int, patch: int, hidden: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, hidden, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, hidden))
        self.position = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, hidden))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.project(images).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(images.shape[0], -1, -1), patches], dim=1) + self.position


class Mlp(nn.Sequential):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__(nn.Linear(hidden, inner), nn.GELU(), nn.Linear(inner, hidden))


class ExplicitAttention(nn.Module):
    """Attention spelt out: matmul, scale, softmax, matmul."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, tokens, hidden] -> queries, keys, values [batch, heads, tokens, head_dim]."""
        batch, tokens, hidden = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        return qkv[0], qkv[1], qkv[2]

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        scores = torch.matmul(query, key.transpose(-2, -1)) * query.shape[-1] ** -0.5
        mixed = torch.matmul(scores.softmax(dim=-1), value)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class FunctionalAttention(ExplicitAttention):
    """The same attention through ``scaled_dot_product_attention``."""

    def forward(self, x: Tensor) -> Tensor:
        mixed = nn.functional.scaled_dot_product_attention(*self.split(x))
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class ModuleAttention(nn.Module):
    """``nn.MultiheadAttention``; ``need_weights=True`` is its default and its explicit-softmax path."""

    def __init__(self, hidden: int, heads: int, need_weights: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=self.need_weights)[0]


class PreNormBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, hidden: int, inner: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = attention
        self.mlp = Mlp(hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ParallelBlock(PreNormBlock):
    """x + attention(norm1(x)) + mlp(norm2(x)): both branches read the same x."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm1(x)) + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Patch embedding, blocks, final norm; returns the class feature [batch, hidden]."""

    def __init__(self, size: int, patch: int, hidden: int, blocks: list[PreNormBlock]) -> None:
        super().__init__()
        self.embed = PatchEmbedding(size, patch, hidden)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class MeanPooledText(nn.Module):
    """A text encoder followed by the mean over the tokens that ``attention_mask`` marks as real."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-9)
