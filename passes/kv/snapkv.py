"""SnapKV: keep what the last queries of the prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from tokopt.analysis.cache import CachedAttention
from tokopt.errors import PassError
from tokopt.passes.kv.base import FINITE, Cached, KVEviction
from tokopt.rewrite.cache import Attention, Memory, in_float32


@dataclass(frozen=True)
class SnapKV(KVEviction):
    """Attention of the last ``window`` queries, summed, then pooled over ``kernel`` slots (arXiv 2404.14469).

    ``pooling`` is the average or the maximum: the authors' results on long texts use ``kernel=7 pooling=max``. The
    window itself is kept, so ``recent`` is at least ``window``. As published, tokens are chosen once, after the prompt
    (``every=0``); with ``every`` the last queries of the text so far choose again. The paper has no sinks: ``sinks=0``.
    """

    recent: int = 32
    every: int = 0
    window: int = 32
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"

    name: ClassVar[str] = "snapkv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.window <= self.recent:
            raise PassError(f"{self.name}: window={self.window} must be in 1 to recent={self.recent}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise PassError(f"{self.name}: kernel={self.kernel} must be odd and positive")
        if self.pooling not in ("avg", "max"):
            raise PassError(f"{self.name}: pooling={self.pooling!r} must be avg or max")

    def memory(self, layer: CachedAttention) -> tuple[Memory, ...]:
        """The last queries, as the attention took them, scaled."""
        _, heads, _, channels = layer.query.meta["val"].shape
        return (Memory("queries", "float32", ("batch", heads, self.window, channels)),)

    def observe(self, attention: Attention, *memory: Tensor) -> tuple[Tensor, ...]:
        """Move the window on by the real queries of the call, wherever padding is; a row without any keeps its own."""
        new = in_float32(attention.query) * attention.scale
        real = attention.positions >= 0
        index = torch.arange(real.shape[1], device=real.device)
        first = torch.where(real, index, real.shape[1]).amin(1, keepdim=True)
        count = real.sum(1, keepdim=True)
        place = torch.arange(self.window, device=real.device) + count
        place = torch.where(
            place < self.window, place, place + first
        )  # of the windows before and of the call
        both = torch.cat([memory[0], new], dim=2)
        return (both.gather(2, place[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])),)

    def score(self, cached: Cached, *memory: Tensor) -> Tensor:
        """Attention of the window's queries to what is older than the window."""
        queries, keys = memory[0], in_float32(cached.keys)
        logits = queries.unflatten(1, (keys.shape[1], -1)) @ keys[:, :, None].mT
        behind = torch.arange(self.window - 1, -1, -1, device=keys.device)  # tokens newer than each query's
        sees = cached.used[:, :, None] & (cached.newer[:, :, None] >= behind[:, None])
        real = cached.used.sum(-1, keepdim=True) > behind
        weights = logits.masked_fill(~sees[:, :, None], -FINITE).softmax(dim=-1)
        mass = torch.where(real[:, :, None, :, None], weights, 0.0).sum(dim=(2, 3))
        older = cached.used & (cached.newer >= self.window)
        if self.pooling == "max":
            return _max_pool(mass * older, self.kernel)
        return avg_pool1d(mass * older, self.kernel, stride=1, padding=self.kernel // 2)


def _max_pool(x: Tensor, kernel: int) -> Tensor:
    """The largest of ``kernel`` neighbours, of numbers above or at 0; ``max_pool1d`` would fix the number of slots."""
    padded, slots = pad(x, (kernel // 2, kernel // 2)), x.shape[-1]
    return torch.stack([padded[..., i : i + slots] for i in range(kernel)]).amax(0)
