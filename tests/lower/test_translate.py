"""Operators in ONNX: operands of several dtypes are promoted as PyTorch does, which ONNX itself does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tokopt
from tokopt.runtime import load

COUNTS, X = torch.arange(12).reshape(3, 4), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

MIXED = {
    "integers times floats": lambda x, counts: counts * x,
    "integers times a number": lambda x, counts: counts * 0.5 + x,
    "integers divided": lambda x, counts: counts / 3 + x,
    "truth plus floats": lambda x, counts: (counts > 2) + x,
    "truth times integers": lambda x, counts: (x > 0) * counts,
    "integers or floats": lambda x, counts: torch.where(x > 0, counts, x),
    "integers compared with floats": lambda x, counts: (counts < x * 5) * 1.0,
}


class Mixed(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return self.function(x, counts)


@pytest.mark.parametrize("name", MIXED)
def test_operands_are_promoted(name: str, tmp_path: Path) -> None:
    model = Mixed(MIXED[name])
    path = tokopt.export(tokopt.capture(model, (X, COUNTS)), tmp_path / "mixed.tokopt")
    got, wanted = load(path)(X.numpy(), COUNTS.numpy()), model(X, COUNTS).numpy()
    assert got.dtype == wanted.dtype
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
