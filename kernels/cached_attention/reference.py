"""Attention of new tokens over a cache, which they are written into first."""

from __future__ import annotations

import torch
from torch import Tensor

from tokopt.kernels.cache_write.reference import cache_write
from tokopt.kernels.dequantize_int8.reference import dequantize_int8
from tokopt.kernels.quantize_int8.reference import quantize_int8
from tokopt.kernels.shared import refuse


def cached_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    length: Tensor,
    mask: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    *,
    heads: int,
    key_heads: int,
    scale: float,
    softcap: float = 0.0,
    interleaved: bool = False,
    alike: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The attention's result and both caches with the new tokens in the slots ``length .. length + tokens - 1``.

    A token's score of a slot is ``scale * q @ k``, capped to ``softcap * tanh(score / softcap)`` where ``softcap`` is
    not 0. The slots that the mask lets a token see are weighted by softmax; a token that sees none gets zeros.

    Args:
        query: [batch, tokens, heads x channels] floating point; float64 is computed in float64. Without ``key``
            and ``value``, queries, keys and values side by side: [batch, tokens, (heads + 2 key heads) x channels].
        key: [batch, tokens, key heads x channels].
        value: as ``key``.
        past_key: [batch, key heads, slots, channels], floating point, or int8 with ``key_scale``.
        past_value: as ``past_key``, with ``value_scale``.
        length: [batch] int64, the first slot to write of each row.
        mask: [1 or batch, 1 or key heads or heads, 1 or tokens, slots] bool, what each token sees.
        cos: [1 or batch, tokens, pairs] by which queries and keys are rotated, at most half the channels; the rest of
            a head stays as it is. Without it and ``sin`` nothing is rotated.
        sin: as ``cos``.
        key_scale: [key heads, 1, channels], the step between two codes: see ``quantize_int8``.
        value_scale: as ``key_scale``.
        heads: a multiple of ``key_heads``; each key head serves as many heads that follow one another.
        key_heads: heads of the cache.
        scale: of scores.
        softcap: the largest score, 0 for none.
        interleaved: whether neighbouring channels are a pair, and not those of both halves.
        alike: whether a kernel has to give a token the same bits beside others, up to 64 in all; here they are the same
            anyway up to rounding.

    Returns:
        [batch, tokens, heads x channels] in the dtype of ``query``, and both caches in their own.

    Raises:
        InputError: sizes that do not fit.
    """
    check(query, key, past_key, past_value, length, mask, heads, key_heads, (key_scale, value_scale))
    channels = past_key.shape[-1]
    if key is None or value is None:
        query, key, value = query.split([heads * channels, key_heads * channels, key_heads * channels], -1)
    q, k, v = (x.unflatten(-1, (-1, channels)).transpose(1, 2) for x in (query, key, value))
    if cos is not None and sin is not None:
        q, k = (rotated(x, cos[:, None], sin[:, None], interleaved) for x in (q, k))
    dtype = query.dtype
    scales = (key_scale, value_scale)
    new = [x if s is None else quantize_int8(x, s.to(x.dtype)) for x, s in zip((k, v), scales, strict=True)]
    caches = [cache_write(past, x, length) for past, x in zip((past_key, past_value), new, strict=True)]
    k, v = (
        x.to(dtype) if s is None else dequantize_int8(x, s.to(dtype))
        for x, s in zip(caches, scales, strict=True)
    )
    group = heads // key_heads
    scores = scale * q @ k.repeat_interleave(group, 1).mT
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    repeated = mask.repeat_interleave(group, 1) if mask.shape[1] == key_heads else mask
    weights = scores.masked_fill(~repeated, -torch.inf).softmax(-1)
    weights = weights.masked_fill(~repeated, 0)
    result = weights @ v.repeat_interleave(group, 1)
    return result.transpose(1, 2).flatten(2), caches[0], caches[1]


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """``x`` [batch, heads, tokens, channels] by angles [1 or batch, 1, tokens, pairs]."""
    pairs = cos.shape[-1]
    turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    turned = torch.empty_like(turning)
    places = (
        (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, pairs), slice(pairs, 2 * pairs))
    )
    first, second = (turning[..., place] for place in places)
    turned[..., places[0]] = cos * first - sin * second
    turned[..., places[1]] = sin * first + cos * second
    return torch.cat((turned, rest), -1)


def check(
    query: Tensor,
    key: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    length: Tensor,
    mask: Tensor,
    heads: int,
    key_heads: int,
    scales: tuple[Tensor | None, Tensor | None],
) -> None:
    """Raise InputError for arguments outside the contract."""
    op = "tokopt.cpu::CachedAttention"
    refuse(
        key_heads < 1 or heads < 1 or heads % key_heads != 0,
        f"{op}: heads={heads} must be a multiple of key_heads={key_heads}.",
    )
    refuse(
        past_key.ndim != 4 or past_key.shape[1] != key_heads or past_key.shape != past_value.shape,
        f"{op}: past_key and past_value must be [batch, {key_heads}, slots, channels], got "
        f"{list(past_key.shape)} and {list(past_value.shape)}.",
    )
    batch, _, slots, channels = past_key.shape
    width = channels * (heads + (2 * key_heads if key is None else 0))
    refuse(
        query.ndim != 3 or query.shape[0] != batch or query.shape[2] != width,
        f"{op}: query must be [{batch}, tokens, {width}], got {list(query.shape)}.",
    )
    tokens = query.shape[1]
    fits = zip(mask.shape, (batch, heads, tokens, slots), strict=False)
    refuse(
        mask.ndim != 4
        or mask.shape[3] != slots
        or any(
            size not in (1, full) and not (axis == 1 and size == key_heads)
            for axis, (size, full) in enumerate(fits)
        ),
        f"{op}: mask must be [1 or {batch}, 1 or the heads, 1 or {tokens}, {slots}], got {list(mask.shape)}.",
    )
    refuse(tuple(length.shape) != (batch,), f"{op}: length must be [{batch}], got {list(length.shape)}.")
    for row, first in enumerate(length.tolist()):
        refuse(
            first < 0 or first > slots - tokens,
            f"{op}: row {row} has length {first}, and {tokens} new tokens do not fit into {slots} slots from there; "
            f"give it more slots.",
        )
    for scale in scales:
        refuse(
            (scale is None) != past_key.is_floating_point(),
            f"{op}: key_scale and value_scale belong to a cache of 8 bits.",
        )
        refuse(
            scale is not None and tuple(scale.shape) != (key_heads, 1, channels),
            f"{op}: key_scale and value_scale must be [{key_heads}, 1, {channels}].",
        )
