"""Writing new entries into the free slots of a preallocated cache."""

import torch
from torch import Tensor

from tokopt.kernels.shared import refuse


def cache_write(cache: Tensor, new: Tensor, length: Tensor) -> Tensor:
    """The cache with ``new`` in the slots ``length .. length + tokens - 1`` of every row.

    ONNX ``TensorScatter`` (opset 24): with one buffer bound to the cache before and after, an engine writes
    the new slots only.

    Args:
        cache: [batch, ..., slots, channels], any dtype.
        new: [batch, ..., tokens, channels], dtype of ``cache``.
        length: [batch] int64, the first free slot of each row; ``length + tokens <= slots``.

    Returns:
        The new cache, shape and dtype of ``cache``.

    Raises:
        InputError: numbers of dimensions that disagree.
    """
    check(cache, new, length)
    slot = length[:, None] + torch.arange(new.shape[-2], device=cache.device)
    index = slot.reshape(new.shape[0], *[1] * (new.ndim - 3), new.shape[-2], 1).expand(new.shape)
    return cache.scatter(-2, index, new)


def fake(cache: Tensor, new: Tensor, length: Tensor) -> Tensor:
    """An empty output of the right shape."""
    check(cache, new, length)
    return torch.empty_like(cache)


def check(cache: Tensor, new: Tensor, length: Tensor) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        cache.ndim < 3 or cache.ndim != new.ndim or length.ndim != 1,
        "tokopt::cache_write: cache and new must be [batch, ..., slots, channels] and length [batch], "
        f"got {cache.ndim}, {new.ndim} and {length.ndim} dimensions.",
    )
