"""The softmax of ``expected_attention`` ran over the sinks too, which take most of it; in the paper it does not.

The law: scores of the tokens that compete are those of a softmax over these alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tokopt.passes.kv.base import Cached
from tokopt.passes.kv.expected_attention import ExpectedAttention


class Still:
    """A rotation by nothing."""

    def mean(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.eye(2).expand(positions.shape[0], 2, 2)


class Layer:
    scale, rotary, window = 1.0, Still(), 0


EXPONENTS = torch.tensor([[5.0, 2.0, 0.0], [0.0, 0.0, 1.8]])
"""Of two query heads that share a key head, by slot."""


def cached(padding: int, free: int) -> tuple[Cached, tuple[torch.Tensor, ...]]:
    """Three tokens between slots that hold none; their keys times the heads' mean queries are the exponents."""
    slots = padding + 3 + free
    keys = torch.full((1, 1, slots, 2), 9.0)
    keys[0, 0, padding : padding + 3] = EXPONENTS.T
    used = torch.zeros(1, 1, slots, dtype=torch.bool)
    used[..., padding : padding + 3] = True
    newer = used.sum(-1, keepdim=True) - used.long().cumsum(-1)
    positions = torch.where(used, 2 - newer, -1)
    layer: Any = Layer()
    values = torch.tensor([1.0, 0.0]).expand_as(keys)
    means = torch.eye(2)[None]  # one query was seen by each head, so there is no covariance
    memory = (torch.ones(1, 1, 1), means, means[..., None] * means[:, :, None])
    return Cached(keys, values, positions, used, newer, torch.tensor([2]), layer), memory


@pytest.mark.parametrize(("padding", "free"), [(0, 0), (2, 0), (0, 3), (2, 3)])
def test_the_softmax_is_over_what_is_no_sink(padding: int, free: int) -> None:
    """Softmax of [2, 0] and of [0, 1.8], averaged over the heads."""
    held, memory = cached(padding, free)
    score = ExpectedAttention(budget=9, sinks=1, recent=0, future=3).score(held, *memory)
    found = score[0, 0, padding + 1 : padding + 3]
    torch.testing.assert_close(found, torch.tensor([0.511, 0.489]), atol=1e-3, rtol=0)
    assert score.isfinite().all()


def test_without_sinks_it_is_over_all() -> None:
    held, memory = cached(0, 0)
    score = ExpectedAttention(budget=9, sinks=0, recent=0, future=3).score(held, *memory)
    torch.testing.assert_close(score[0, 0], EXPONENTS.softmax(-1).mean(0))


@pytest.mark.parametrize("sinks", [3, 8])
def test_a_text_of_sinks_has_finite_scores(sinks: int) -> None:
    held, memory = cached(1, 1)
    score = ExpectedAttention(budget=20, sinks=sinks, recent=0, future=3).score(held, *memory)
    assert score.isfinite().all()
