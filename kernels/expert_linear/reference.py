"""Products with the weights of those experts that were chosen for a token, and with no others."""

import torch
from torch import Tensor

from tokopt.kernels.shared import refuse


def expert_linear(x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    """``y[t, j] = weight[chosen[t, j]] @ x[t, j]``, and 0 where ``chosen`` names no expert.

    The op ``tokopt.cpu::ExpertLinear`` is this with the numbers of ``tokopt.cpu::QuantizedLinear``: weights in blocks
    of 4 or 8 bits, activations rounded to 8, optionally a bias [experts, out] and a gate; and optionally with the sum
    over j of ``share[t, j] * y[t, j]``, ``share`` [tokens, k], in the place of y. ``tokopt.cpu::FloatExpertLinear``
    has a reference of its own.

    Args:
        x: [tokens, k, in], or [tokens, 1, in] where all experts of a token read the same.
        chosen: [tokens, k] int64; a number that is negative or not below the number of experts is no expert.
        weight: [experts, out, in] in the dtype of ``x``.

    Returns:
        [tokens, k, out] in the dtype of ``x``.

    Raises:
        InputError: numbers of dimensions, or sizes, that do not fit.
    """
    check(x, chosen, weight)
    y = x.new_zeros(*chosen.shape, weight.shape[1])
    for expert in range(len(weight)):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        if len(token):  # its weight is not read otherwise
            own = x[token, place if x.shape[1] > 1 else 0]
            y[token, place] = own @ weight[expert].T
    return y


def take_expert(every: Tensor, chosen: Tensor, experts: int) -> Tensor:
    """Of what all experts made [tokens, k or 1, experts x out], what the chosen one did: [tokens, k, out]."""
    own = chosen[..., None] == torch.arange(experts, device=chosen.device)
    made = own.to(every.dtype)[:, :, None] @ every.unflatten(-1, (experts, -1))
    return made[:, :, 0]


def fake(x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    """An empty output of the right shape."""
    check(x, chosen, weight)
    return x.new_empty(*chosen.shape, weight.shape[1])


def check(x: Tensor, chosen: Tensor, weight: Tensor) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        (x.ndim, chosen.ndim, weight.ndim) != (3, 2, 3),
        "tokopt::expert_linear: x must be [tokens, k or 1, in], chosen [tokens, k] and weight [experts, out, in], got "
        f"{x.ndim}, {chosen.ndim} and {weight.ndim} dimensions.",
    )
    refuse(
        x.shape[2] != weight.shape[2],
        f"tokopt::expert_linear: x has {x.shape[2]} inputs and weight {weight.shape[2]}; they must be as many.",
    )
    refuse(
        x.shape[0] != chosen.shape[0],
        f"tokopt::expert_linear: x has {x.shape[0]} tokens and chosen {chosen.shape[0]}; pass both for as many.",
    )
    refuse(
        x.shape[1] not in (1, chosen.shape[1]),
        f"tokopt::expert_linear: x has {x.shape[1]} rows for each token; give one, or one for each of the "
        f"{chosen.shape[1]} chosen experts.",
    )
