"""Parity where the program chooses tokens: near ties may fall either way, everything else must agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tokopt
from tokopt.errors import LoweringError
from tokopt.kernels import ops
from tokopt.lower.onnx.export import lower
from tokopt.lower.parity.check import check_parity
from tokopt.lower.parity.selections import DIFFERENT_BY_RANK, _compare, _fate

PAIRS, CHANNELS, R = 100, 256, 50


class Merge(nn.Module):
    """x [batch, tokens, channels]: merge by the similarity of ``look(x)``, then scale."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Linear(CHANNELS, CHANNELS, bias=False)
        nn.init.orthogonal_(self.look.weight)
        self.scale = nn.Parameter(torch.ones(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.ones_like(x[..., 0])
        keep, drop, dest = ops.bipartite_match(self.look(x), size, R, 0)
        return ops.merge_tokens(x, size, keep, drop, dest)[0] * self.scale


def pairs_with_a_tie() -> Tensor:
    """Neighbours 2i and 2i + 1 are the less similar the larger i, but the pairs at the cut are nearly equal."""
    basis = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS))[0]
    offset = torch.linspace(0.05, 0.3, PAIRS)
    offset[R] = offset[R - 1] + 1e-7
    near, far = basis[:PAIRS], basis[PAIRS : 2 * PAIRS] * offset[:, None]
    return torch.stack([near + far, near - far], dim=1).reshape(1, 2 * PAIRS, CHANNELS)


@pytest.fixture
def lowered(tmp_path: Path) -> tuple[Merge, tokopt.Program, Path]:
    """A model, its program (which shares the model's weights), and its ONNX file (which does not)."""
    torch.manual_seed(0)
    model = Merge()
    program = tokopt.capture(model, (pairs_with_a_tie(),), dynamic={}).main
    return model, program, lower(program, tmp_path, "forward")


def disturb(weight: Tensor, by: float) -> None:
    with torch.no_grad():
        weight += by * torch.randn(weight.shape)


def choose_the_other(model: Merge, program: tokopt.Program) -> None:
    """Disturb the weights that the choice alone depends on, as rounding would, until it falls the other way."""
    before = program(*program.example)[0]
    for _ in range(50):
        disturb(model.look.weight, 1e-6)
        if (program(*program.example)[0] - before).norm() > 0.01 * before.norm():
            return
    raise AssertionError("the tie never fell the other way")


def test_near_ties_may_fall_either_way(lowered: tuple[Merge, tokopt.Program, Path]) -> None:
    model, program, path = lowered
    choose_the_other(model, program)
    check_parity(program, path, "forward")
    assert {file.name for file in path.parent.iterdir()} == {"forward.onnx", "weights.data"}


def test_arithmetic_is_still_compared(lowered: tuple[Merge, tokopt.Program, Path]) -> None:
    model, program, path = lowered
    choose_the_other(model, program)
    disturb(model.scale, 1e-3)
    with pytest.raises(LoweringError, match=r"output 'output' differs .* NMSE"):
        check_parity(program, path, "forward")


def test_another_choice_everywhere_is_an_error(lowered: tuple[Merge, tokopt.Program, Path]) -> None:
    model, program, path = lowered
    with torch.no_grad():
        model.look.weight[4:] = 0  # four channels of 256 are left to compare by
    with pytest.raises(LoweringError, match=r"bipartite_match chooses differently for \d+ of 200 tokens"):
        check_parity(program, path, "forward")


def test_rounding_moves_few_tokens_where_roles_alternate_by_rank() -> None:
    torch.manual_seed(0)
    metric, size = torch.randn(2, 1000, 64), torch.ones(2, 1000)
    own = ops.energy_match(metric, size, 500, 0, 0.5)
    rounded = ops.energy_match(metric * (1 + 1e-6 * torch.randn(metric.shape)), size, 500, 0, 0.5)
    other = ops.energy_match(torch.randn(metric.shape), size, 500, 0, 0.5)
    changed, tokens = _compare(list(own), list(rounded))
    assert 0 < changed < DIFFERENT_BY_RANK * tokens
    assert _compare(list(own), list(other))[0] > 4 * DIFFERENT_BY_RANK * tokens


def test_fate_ignores_the_order_of_the_lists() -> None:
    keep, drop, dest = torch.tensor([[0, 2, 3]]), torch.tensor([[1, 4]]), torch.tensor([[0, 2]])
    assert _fate([keep, drop, dest]).tolist() == [[0, 0, 2, 3, 3]]
    assert _fate([keep.flip(1), drop.flip(1), torch.tensor([[0, 2]])]).tolist() == [[0, 0, 2, 3, 3]]
    assert _fate([keep, drop]).tolist() == [[0, -1, 2, 3, -1]]
