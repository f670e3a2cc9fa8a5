"""Size-weighted merging of dropped tokens into kept ones."""

import torch
from torch import Tensor

from tokopt.kernels.shared import TINY, refuse, rows


def merge_tokens(x: Tensor, size: Tensor, keep: Tensor, drop: Tensor, dest: Tensor) -> tuple[Tensor, Tensor]:
    """Average each kept token with the tokens merged into it, weighted by size (ToMe, arXiv 2210.09461).

    With G_k = {keep_k} and the drops whose dest is k, ``new_size_k = sum_{i in G_k} size_i`` and
    ``merged_k = sum_{i in G_k} size_i x_i / new_size_k``: the total of ``size * x`` is conserved. A slot of
    padding only (``new_size`` 0) is zero.

    Args:
        x: [batch, tokens, channels] of finite values, any float dtype; accumulated in float32.
        size: [batch, tokens] float32; 0 marks padding.
        keep: [batch, kept] int64, old indices in the new order.
        drop: [batch, r] int64, old indices.
        dest: [batch, r] int64, the slot in the new order that each drop joins.

    Returns:
        ``merged`` [batch, kept, channels] in the dtype of ``x``; ``new_size`` [batch, kept] float32.

    Raises:
        InputError: numbers of dimensions or of tokens that disagree.
    """
    check(x, size, keep, drop, dest)
    kept_size, drop_size = size.gather(1, keep), size.gather(1, drop)
    slot = torch.arange(keep.shape[1], device=x.device)
    # A one-hot product, since a scatter with duplicate indices is not portable (TensorRT miscomputes it).
    share = (dest[:, None, :] == slot[None, :, None]) * drop_size[:, None, :]
    new_size = kept_size + share.sum(dim=-1)
    scale = 1 / new_size.clamp_min(TINY)
    own = (kept_size * scale)[:, :, None] * rows(x, keep).float()
    merged = own + (share * scale[:, :, None]) @ rows(x, drop).float()
    return merged.to(x.dtype), new_size


def fake(x: Tensor, size: Tensor, keep: Tensor, drop: Tensor, dest: Tensor) -> tuple[Tensor, Tensor]:
    """Empty outputs of the right shapes."""
    check(x, size, keep, drop, dest)
    return x.new_empty((*keep.shape, x.shape[2])), size.new_empty(keep.shape)


def check(x: Tensor, size: Tensor, keep: Tensor, drop: Tensor, dest: Tensor) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        (x.ndim, size.ndim, keep.ndim, drop.ndim, dest.ndim) != (3, 2, 2, 2, 2),
        "tokopt::merge_tokens: x must be [batch, tokens, channels], the others two-dimensional.",
    )
    refuse(
        x.shape[1] != size.shape[1],
        f"tokopt::merge_tokens: x has {x.shape[1]} tokens and size {size.shape[1]}; pass both for the same.",
    )
    refuse(
        drop.shape[1] != dest.shape[1],
        f"tokopt::merge_tokens: {drop.shape[1]} drops and {dest.shape[1]} dests; each drop needs one dest.",
    )
