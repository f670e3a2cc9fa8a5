"""The next token, drawn from logits, and how probable the model finds it."""

import torch
from torch import Tensor

from tokopt.kernels.draw.reference import draw
from tokopt.kernels.shared import refuse
from tokopt.kernels.truncated_softmax.reference import truncated_softmax


def draw_tokens(
    logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """A token of :func:`~tokopt.kernels.truncated_softmax.reference.truncated_softmax`, drawn by a random number.

    :func:`~tokopt.kernels.draw.reference.draw` says how.

    Args:
        logits: [batch, rows, vocabulary], any float dtype; -inf forbids a token.
        uniform: [batch, rows] float32 in [0, 1).
        temperature: [batch] float32, not negative.
        top_k: [batch] int64; 0 leaves all tokens.
        top_p: [batch] float32 above 0; 1 leaves all tokens.
        min_p: [batch] float32 from 0 to 1.

    Returns:
        Tokens [batch, rows] int64, and the logarithm of each one's probability in the softmax of the logits as they
        are, [batch, rows] float32, or float64 of such logits. A row with a NaN, with +inf, or with -inf alone gives
        -1 and NaN.

    Raises:
        InputError: numbers of dimensions that disagree.
    """
    check(logits, uniform, temperature, top_k, top_p, min_p)
    token = draw(truncated_softmax(logits, temperature, top_k, top_p, min_p), uniform)
    wide = logits.to(_wide(logits))
    below = wide - wide.amax(
        -1, keepdim=True
    )  # else the logarithm of a likely token is a difference of large numbers
    chosen = below.gather(-1, token.clamp_min(0)[:, :, None])[:, :, 0]
    return token, torch.where(token < 0, torch.nan, chosen - below.logsumexp(-1))


def fake(
    logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Empty outputs of the right shape."""
    check(logits, uniform, temperature, top_k, top_p, min_p)
    shape = logits.shape[:2]
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=_wide(logits))


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def check(
    logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        (logits.ndim, uniform.ndim) != (3, 2)
        or (temperature.ndim, top_k.ndim, top_p.ndim, min_p.ndim) != (1, 1, 1, 1),
        "tokopt::draw_tokens: logits must be [batch, rows, vocabulary], uniform [batch, rows], and temperature, top_k, "
        "top_p and min_p [batch].",
    )
