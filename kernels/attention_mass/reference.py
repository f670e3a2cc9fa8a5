"""The attention that every slot of a cache gets, which eviction scores are made of."""

import torch
from torch import Tensor

from tokopt.kernels.shared import refuse


def attention_mass(query: Tensor, key: Tensor, mask: Tensor, positions: Tensor, scale: float) -> Tensor:
    """``sum over real queries and the heads of a key head of softmax(scale * q k^T)`` (H2O, arXiv 2306.14048).

    Args:
        query: [batch, heads, tokens, channels], any float dtype; computed in float32.
        key: [batch, key heads, slots, channels], dtype of ``query``; heads are a multiple of key heads.
        mask: [batch, 1 or heads, tokens, slots] bool, which slot a query sees; every real query sees one.
        positions: [batch, tokens] int64, -1 for padding, whose queries do not count.
        scale: what the products are multiplied by.

    Returns:
        [batch, key heads, slots, 1] float32.

    Raises:
        InputError: numbers of dimensions that disagree.
    """
    check(query, key, mask, positions)
    groups = (key.shape[1], query.shape[1] // key.shape[1])
    logits = query.float().unflatten(1, groups) @ key.float()[:, :, None].mT * scale
    mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, groups)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    real = (positions >= 0)[:, None, None, :, None]
    return torch.where(real, weights, 0.0).sum(dim=(2, 3))[..., None]


def fake(query: Tensor, key: Tensor, mask: Tensor, positions: Tensor, scale: float) -> Tensor:
    """An empty output of the right shape."""
    check(query, key, mask, positions)
    return key.new_empty((*key.shape[:3], 1), dtype=torch.float32)


def check(query: Tensor, key: Tensor, mask: Tensor, positions: Tensor) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        (query.ndim, key.ndim, mask.ndim, positions.ndim) != (4, 4, 4, 2),
        "tokopt::attention_mass: query, key and mask must be four-dimensional and positions [batch, tokens], got "
        f"{query.ndim}, {key.ndim}, {mask.ndim} and {positions.ndim} dimensions.",
    )
