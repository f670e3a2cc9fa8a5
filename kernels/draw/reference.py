"""Drawing one of many by a random number."""

import torch
from torch import Tensor

from tokopt.kernels.shared import refuse


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first token at which the cumulative distribution exceeds ``uniform`` (inverse transform sampling).

    A token of probability 0 is never drawn. Sums are float64.

    Args:
        probabilities: [batch, rows, vocabulary] float32, not negative; a row need not sum to 1.
        uniform: [batch, rows] float32 in [0, 1).

    Returns:
        [batch, rows] int64; -1 where a row sums to no positive number.

    Raises:
        InputError: numbers of dimensions that disagree.
    """
    check(probabilities, uniform)
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[..., -1]
    token = (cumulative <= (uniform.double() * total)[..., None]).sum(-1)
    return torch.where(total > 0, token, -1)


def fake(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """An empty output of the right shape."""
    check(probabilities, uniform)
    return torch.empty(probabilities.shape[:2], dtype=torch.int64, device=probabilities.device)


def check(probabilities: Tensor, uniform: Tensor) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        (probabilities.ndim, uniform.ndim) != (3, 2),
        "tokopt::draw: probabilities must be [batch, rows, vocabulary] and uniform [batch, rows], got "
        f"{probabilities.ndim} and {uniform.ndim} dimensions.",
    )
