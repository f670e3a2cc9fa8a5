"""BERxiT (Xin et al., EACL 2021): a learned guess of how likely an exit is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokopt.passes.exit.rules.base import Rule, Seen

WRONG, RIGHT = 0.99, 0.01
"""Certainty targets of the reference: a row's target is ``1 - exp(-c)``."""

STEPS, DECAY = 100, 1e-3
"""Steps of L-BFGS, and the penalty on the squared weights."""


@dataclass(frozen=True)
class Uncertainty(Rule):
    """Rows leave whose predicted error, one linear layer and a sigmoid shared by all exits, is below the threshold."""

    def score(
        self, seen: Seen, carried: Sequence[Tensor], fitted: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The predicted error; at least 0."""
        weight, bias = fitted
        return ((seen.features * weight).sum(-1) + bias).sigmoid().float(), []

    def fit(self, seen: Sequence[Seen], losses: Sequence[Tensor]) -> list[Tensor]:
        """Weight [channels] and bias [1] by least squares of the sigmoid, all exits together, features standardized."""
        features = torch.cat([one.features for one in seen]).double()
        wrong = torch.cat(list(losses)).double()
        target = 1 - torch.exp(-(RIGHT + (WRONG - RIGHT) * wrong))
        mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)
        x = (features - mean) / scale
        weight = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
        bias = torch.logit(target.mean())[None].detach().requires_grad_()
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            error = ((x @ weight + bias).sigmoid() - target).square().mean()
            loss = error + DECAY * weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        weight, bias = weight.detach() / scale, bias.detach()
        return [weight.float(), (bias - (mean * weight).sum()).float()]


RULE = Uncertainty()
