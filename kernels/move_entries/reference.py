"""Moving entries of a cache to where those of the first new tokens are."""

import torch
from torch import Tensor

from tokopt.kernels.shared import refuse


def move_entries(cache: Tensor, path: Tensor, length: Tensor) -> Tensor:
    """The cache with the entry of slot ``length + path[i]`` in slot ``length + i``, for all i at once.

    What a tree of tokens left in the slots from ``length`` on becomes what its path alone would have left there. With
    one buffer bound to the cache before and after, an engine writes the slots of the path only; slots behind them
    stay as they are.

    Args:
        cache: [batch, heads, slots, channels], any dtype.
        path: [batch, nodes] int64, where the nodes' entries are, counted from ``length``; in any order, and twice
            where one is wanted twice.
        length: [batch] int64, the first slot to write of each row; ``length + nodes <= slots``.

    Returns:
        The new cache, shape and dtype of ``cache``.

    Raises:
        InputError: numbers of dimensions that disagree.
    """
    check(cache, path, length)
    batch, heads, _, channels = cache.shape
    shape = (batch, heads, path.shape[1], channels)

    def index(slot: Tensor) -> Tensor:
        return slot[:, None, :, None].expand(shape)

    node = torch.arange(path.shape[1], device=cache.device)
    moved = cache.gather(2, index(length[:, None] + path))
    return cache.scatter(2, index(length[:, None] + node), moved)


def fake(cache: Tensor, path: Tensor, length: Tensor) -> Tensor:
    """An empty output of the right shape."""
    check(cache, path, length)
    return torch.empty_like(cache)


def check(cache: Tensor, path: Tensor, length: Tensor) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        (cache.ndim, path.ndim, length.ndim) != (4, 2, 1),
        "tokopt::move_entries: cache must be [batch, heads, slots, channels], path [batch, nodes] and length [batch], "
        f"got {cache.ndim}, {path.ndim} and {length.ndim} dimensions.",
    )
