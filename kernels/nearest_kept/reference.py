"""The most similar kept token of every dropped one."""

from torch import Tensor

from tokopt.kernels.shared import check_removal, refuse, rows, unit


def nearest_kept(metric: Tensor, keep: Tensor, drop: Tensor, prefix: int) -> Tensor:
    """For each dropped token the slot of the most similar kept one, so that a pruning method can merge.

    ``dest_j = argmax_{k >= prefix} cos(metric[drop_j], metric[keep_k])``, ties to the lowest slot.

    Args:
        metric: [batch, tokens, channels], any float dtype; compared in float32.
        keep: [batch, kept] int64, old indices in the new order.
        drop: [batch, r] int64, old indices.
        prefix: leading slots of ``keep`` that nothing is assigned to.

    Returns:
        ``dest`` [batch, r] int64, slots in the new order, all ``>= prefix``.

    Raises:
        InputError: numbers of dimensions that disagree, or no kept token beside the prefix.
    """
    check(metric, keep, drop, prefix)
    score = unit(rows(metric, drop)) @ unit(rows(metric, keep[:, prefix:])).mT
    return prefix + score.argmax(dim=-1)


def fake(metric: Tensor, keep: Tensor, drop: Tensor, prefix: int) -> Tensor:
    """An empty output of the right shape."""
    check(metric, keep, drop, prefix)
    return drop.new_empty(drop.shape)


def check(metric: Tensor, keep: Tensor, drop: Tensor, prefix: int) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        (metric.ndim, keep.ndim, drop.ndim) != (3, 2, 2),
        "tokopt::nearest_kept: metric must be [batch, tokens, channels], keep and drop two-dimensional.",
    )
    check_removal("nearest_kept", keep.shape[1], 0, prefix, limit=0, at_least=1)
