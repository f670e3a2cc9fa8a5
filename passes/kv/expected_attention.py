"""Expected attention: keep what the queries to come will attend to, as their statistics say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokopt.analysis.cache import CachedAttention
from tokopt.errors import PassError
from tokopt.passes.kv.base import FINITE, Cached, KVEviction
from tokopt.rewrite.cache import Attention, Memory, in_float32


@dataclass(frozen=True)
class ExpectedAttention(KVEviction):
    """Expected attention of the next ``future`` queries, times the length of the value (arXiv 2510.00636).

    Queries before their rotation are taken for normal, with the mean and covariance of those seen so far (from the
    token after the ``sinks`` on). Rotated by the mean rotation of the next ``future`` positions, they have mean m
    and covariance S, and ``E[exp(s q.k)] = exp(s m.k + s^2 k.S.k / 2)`` with the attention's scale s. The score is
    the softmax of that exponent over the keys, averaged over the queries' heads, plus ``epsilon``, times ``|v|``. The
    ``sinks`` are never evicted and, as published, no part of the softmax: much of the attention is theirs.
    The paper protects no recent tokens (``recent=0``).

    Needs rotary embeddings, and refuses models without.
    """

    future: int = 512
    epsilon: float = 0.0

    name: ClassVar[str] = "expected_attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.future < 1 or self.epsilon < 0:
            raise PassError(
                f"{self.name}: future={self.future} must be positive and epsilon={self.epsilon} not negative"
            )

    @property
    def needs_rotary(self) -> bool:
        """The queries' rotation is undone and done again for positions to come."""
        return True

    def memory(self, layer: CachedAttention) -> tuple[Memory, ...]:
        """Of the queries before rotation: how many, their sum, and the sum of their outer products."""
        _, heads, _, channels = layer.query.meta["val"].shape
        return (
            Memory("seen", "float32", ("batch", 1, 1)),
            Memory("total", "float32", ("batch", heads, channels)),
            Memory("products", "float32", ("batch", heads, channels, channels)),
        )

    def observe(self, attention: Attention, *memory: Tensor) -> tuple[Tensor, ...]:
        """Add this call's queries, those of padding and of the sinks excepted."""
        assert attention.rotary is not None
        seen, total, products = memory
        counted = (attention.positions >= self.sinks)[:, None, :, None]
        query = attention.rotary.rotate(in_float32(attention.query), -attention.positions[:, None])
        query = torch.where(counted, query, 0.0)
        return (
            seen + counted.sum(dim=(1, 2))[:, None],
            total + query.sum(dim=2),
            products + query.mT @ query,
        )

    def score(self, cached: Cached, *memory: Tensor) -> Tensor:
        """Expected attention times the value's length."""
        assert cached.layer.rotary is not None
        seen, total, products = memory
        keys, scale = in_float32(cached.keys), cached.layer.scale
        ahead = torch.arange(1, self.future + 1, device=keys.device)
        rotation = cached.layer.rotary.mean(cached.newest[:, None] + ahead)[:, None]
        count = seen.clamp(min=1)
        mean = total / count
        spread = products / count[..., None] - mean[..., None] * mean[..., None, :]
        mean, spread = rotation @ mean[..., None], rotation @ spread @ rotation.mT
        mean, spread = (x.unflatten(1, (keys.shape[1], -1)) for x in (mean, spread))
        grouped = keys[:, :, None]
        exponent = scale * (grouped @ mean)[..., 0]
        exponent = exponent + scale**2 / 2 * ((grouped @ spread) * grouped).sum(-1)
        compared = cached.used & (cached.older >= self.sinks)
        expected = exponent.masked_fill(~compared[:, :, None], -FINITE).softmax(dim=-1).mean(dim=2)
        return (expected + self.epsilon) * in_float32(cached.values).norm(dim=-1)
