"""The attention bias of merged tokens."""

from torch import Tensor

from tokopt.kernels.shared import TINY, refuse


def log_size(size: Tensor) -> Tensor:
    """Proportional attention (ToMe, arXiv 2210.09461): ``softmax(q k^T / sqrt(d) + log(size)) v``.

    A key that stands for s equal tokens then weighs as much as s keys. Padding (``size`` 0) gets the finite
    ``log(tiny)``, about -87, so that a row of padding only gives no NaN.

    Args:
        size: [batch, tokens] float32.

    Returns:
        ``log(max(size, tiny))``, [batch, 1, 1, tokens] float32, to be added to the attention logits.

    Raises:
        InputError: a size that is not two-dimensional.
    """
    check(size)
    return size.float().clamp_min(TINY).log()[:, None, None, :]


def fake(size: Tensor) -> Tensor:
    """An empty output of the right shape."""
    check(size)
    return size.float().new_empty((size.shape[0], 1, 1, size.shape[1]))


def check(size: Tensor) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(size.ndim != 2, f"tokopt::log_size: size must be [batch, tokens], got {size.ndim} dimensions.")
