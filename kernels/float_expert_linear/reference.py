"""Products with the float32 weights of chosen experts, with their biases, and a gate or the sum by shares."""

from __future__ import annotations

from torch import Tensor, where

from tokopt.kernels.expert_linear.reference import expert_linear
from tokopt.kernels.quantized_linear.reference import GATES
from tokopt.kernels.shared import refuse


def float_expert_linear(
    x: Tensor,
    chosen: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    share: Tensor | None = None,
    *,
    gate: str | None = None,
) -> Tensor:
    """``y[t, j] = x[t, j] @ weight[chosen[t, j]] + bias[chosen[t, j]]``, and 0 where ``chosen`` names no expert.

    Args:
        x: [tokens, k, in], or [tokens, in] where all experts of a token read the same.
        chosen: [tokens, k] int64; a number that is negative or not below the number of experts is no expert.
        weight: [experts, in, out] in the dtype of ``x``.
        bias: [experts, out] in the dtype of ``x``.
        share: [tokens, k] in the dtype of ``x``: the result is the sum over j of ``share[t, j] * y[t, j]``.
        gate: one of :data:`GATES`: the result is its value of the first half of y times the second half.

    Returns:
        [tokens, k, out], or [tokens, k, out / 2] with a gate; without the axis of k where there is a ``share``.

    Raises:
        InputError: sizes that do not fit, another gate.
    """
    refuse(
        gate is not None and gate not in GATES,
        f"float_expert_linear: gate={gate} must be silu, gelu or gelu_tanh.",
    )
    y = expert_linear(x[:, None] if x.ndim == 2 else x, chosen, weight.transpose(1, 2))
    if bias is not None:
        known = (chosen >= 0) & (chosen < len(weight))
        y = where(known[..., None], y + bias[where(known, chosen, 0)], 0)
    if gate is not None:
        gates, up = y.chunk(2, dim=-1)
        y = GATES[gate](gates) * up
    return y if share is None else (y * share[..., None]).sum(1)
