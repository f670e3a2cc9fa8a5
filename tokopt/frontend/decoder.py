"""The form of a decoder that :func:`tokopt.capture_lm` takes, and of the cache that it is given."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Cache(Protocol):
    """What a decoder is given to keep its keys and values in."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values [batch, heads, tokens, channels]; return all [batch, heads, slots, channels]."""
        ...


class Decoder(Protocol):
    """A hand-written language model that :func:`tokopt.capture_lm` takes: a module whose ``forward`` has this form."""

    def __call__(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache, rows: Tensor) -> Tensor:
        """Return the logits [batch, rows, vocabulary] of the tokens ``rows`` [rows] int64.

        ``tokens`` and ``positions`` are [batch, tokens] int64. Attention is
        ``scaled_dot_product_attention(queries, *cache.update(layer, keys, values), attn_mask=mask)`` with
        ``mask`` [batch, 1, tokens, slots] bool.
        """
        ...
