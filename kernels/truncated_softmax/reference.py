"""The distribution that the next token is drawn from."""

import torch
from torch import Tensor

from tokopt.kernels.shared import TINY, refuse

LOWEST = -104.0
"""A logit that is so much below the largest one has a float32 weight of 0."""

HALVINGS = 32
"""Bisections of a threshold: it is known to 105 * 2**-32."""


def truncated_softmax(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The softmax of ``logits / temperature`` over the tokens that top-k, top-p and min-p leave.

    As in the chain of Hugging Face's ``generate``: first the ``top_k`` likeliest stay; of these the fewest whose
    probabilities sum to ``top_p`` or more (arXiv 1904.09751); of these the ones at least ``min_p`` times as likely as
    the likeliest (arXiv 2407.01082). Nothing is sorted: the thresholds of top-k and top-p are found by bisection, so
    tokens whose logits differ by less than 3e-8 times the temperature count as equal, and equal ones stay together.
    A temperature of 0 gives the first of the likeliest tokens probability 1.

    Args:
        logits: [batch, rows, vocabulary], any float dtype; -inf forbids a token.
        temperature: [batch] float32, not negative.
        top_k: [batch] int64; 0 leaves all tokens.
        top_p: [batch] float32 above 0; 1 leaves all tokens.
        min_p: [batch] float32 from 0 to 1.

    Returns:
        Probabilities [batch, rows, vocabulary] float32; NaN in a row with a NaN, with +inf, or with -inf alone.

    Raises:
        InputError: numbers of dimensions that disagree.
    """
    check(logits, temperature, top_k, top_p, min_p)
    temperature, top_k, top_p, min_p = (x[:, None, None] for x in (temperature, top_k, top_p, min_p))
    wide = logits.float()
    below = wide - wide.amax(-1, keepdim=True)
    scaled = below / temperature.clamp_min(TINY)
    scaled = torch.where(below == 0, 0.0, scaled)
    weight = scaled.exp()
    nothing = 0 * weight.sum(-1, keepdim=True)  # or NaN
    count = torch.where(top_k > 0, top_k, logits.shape[-1])
    kept = scaled >= _threshold(scaled, torch.ones_like(weight), count.float())
    weight = weight * kept
    least = _threshold(scaled, weight, top_p * weight.sum(-1, keepdim=True))
    weight = torch.where((top_p >= 1) | (scaled >= least), weight, 0.0)
    weight = torch.where(scaled.exp() >= min_p, weight, 0.0)
    likeliest = torch.nn.functional.one_hot(wide.argmax(-1), logits.shape[-1])
    return torch.where(temperature > 0, weight / weight.sum(-1, keepdim=True), likeliest) + nothing


def _threshold(scaled: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
    """The largest threshold [.., 1] such that the weights of what lies at or above it sum to ``wanted`` or more."""
    low = torch.full_like(wanted.expand(*scaled.shape[:-1], 1), LOWEST, dtype=torch.float32)
    high = torch.ones_like(low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = (weight * (scaled >= middle)).sum(-1, keepdim=True) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def fake(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """An empty output of the right shape."""
    check(logits, temperature, top_k, top_p, min_p)
    return torch.empty_like(logits, dtype=torch.float32, memory_format=torch.contiguous_format)


def check(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> None:
    """Raise InputError for arguments outside the contract."""
    refuse(
        (logits.ndim, temperature.ndim, top_k.ndim, top_p.ndim, min_p.ndim) != (3, 1, 1, 1, 1),
        "tokopt::truncated_softmax: logits must be [batch, rows, vocabulary], and temperature, top_k, top_p and min_p "
        "[batch].",
    )
