"""Selection of the slots of a cache that survive an eviction."""

import torch
from torch import Tensor

from tokopt.kernels.shared import refuse


def keep_slots(score: Tensor, used: Tensor, budget: Tensor, sinks: int, recent: int) -> Tensor:
    """Keep the ``sinks`` oldest and the ``recent`` newest used slots, and of the others those of highest score.

    Every head of a row keeps ``min(budget, used slots)`` slots. A lower slot is an older token; ties go to the
    lowest slot, also among the protected ones where the budget cannot hold them all.

    Args:
        score: [batch, heads, slots], any float dtype, finite; compared in float32.
        used: [batch, slots] bool, false for free slots and padding, which are never kept.
        budget: [batch] int64, slots to keep.
        sinks: oldest tokens that are always kept.
        recent: newest tokens that are always kept.

    Returns:
        [batch, heads, slots] bool.

    Raises:
        InputError: numbers of dimensions that disagree, a negative ``sinks`` or ``recent``.
    """
    check(score, used, budget, sinks, recent)
    older = used.long().cumsum(-1) - 1
    newer = older[:, -1:] - older
    protected = used & ((older < sinks) | (newer < recent))
    priority = torch.where(used[:, None], score.float(), -torch.inf)
    priority = torch.where(protected[:, None], torch.inf, priority)
    order = priority.sort(dim=-1, descending=True, stable=True).indices
    count = torch.minimum(budget, older[:, -1] + 1)
    first = torch.arange(used.shape[1], device=used.device) < count[:, None, None]
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, first.expand(order.shape))


def fake(score: Tensor, used: Tensor, budget: Tensor, sinks: int, recent: int) -> Tensor:
    """An empty output of the right shape."""
    check(score, used, budget, sinks, recent)
    return torch.empty_like(score, dtype=torch.bool)


def check(score: Tensor, used: Tensor, budget: Tensor, sinks: int, recent: int) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        (score.ndim, used.ndim, budget.ndim) != (3, 2, 1),
        "tokopt::keep_slots: score must be [batch, heads, slots], used [batch, slots] and budget [batch], got "
        f"{score.ndim}, {used.ndim} and {budget.ndim} dimensions.",
    )
    refuse(
        min(sinks, recent) < 0, f"tokopt::keep_slots: sinks={sinks} and recent={recent} must be at least 0."
    )
