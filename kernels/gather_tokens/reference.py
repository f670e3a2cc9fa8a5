"""Selection of tokens along any axis of a side tensor."""

from torch import Tensor

from tokopt.kernels.shared import refuse, rows


def gather_tokens(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Pick the tokens ``index`` along axis ``dim``: ``y[b, ..., k, ...] = x[b, ..., index[b, k], ...]``.

    Args:
        x: [batch or 1, ..., tokens, ...], any dtype; a batch of 1 is shared by all rows of ``index``.
        index: [batch, kept] int64, tokens to pick.
        dim: the token axis of ``x``, from 1 on (axis 0 is the batch).

    Returns:
        [batch, ..., kept, ...] in the dtype of ``x``.

    Raises:
        InputError: ``dim`` out of range, or batches that disagree.
    """
    check(x, index, dim)
    x = x.expand(index.shape[0], *x.shape[1:])
    return rows(x.movedim(dim, 1), index).movedim(1, dim).contiguous()


def fake(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """An empty output of the right shape."""
    check(x, index, dim)
    return x.new_empty((index.shape[0], *x.shape[1:dim], index.shape[1], *x.shape[dim + 1 :]))


def check(x: Tensor, index: Tensor, dim: int) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        index.ndim != 2, f"tokopt::gather_tokens: index must be [batch, kept], got {index.ndim} dimensions."
    )
    refuse(
        not 1 <= dim < x.ndim,
        f"tokopt::gather_tokens: dim={dim} is not a token axis of a tensor of {x.ndim} dimensions; "
        f"use 1 to {x.ndim - 1}.",
    )
    mine, other = x.shape[0], index.shape[0]
    if isinstance(mine, int) and mine != 1:
        refuse(
            mine != other,
            f"tokopt::gather_tokens: x has batch={mine} and index batch={other}; make them equal, or x's 1.",
        )
