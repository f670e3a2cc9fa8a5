"""What Torch-TensorRT compiles, called on the GPU: ``python -m pytest tests/gpu``, on a machine with both.

It computes what the bundle's own program computes on the CPU, compiled in the process and opened from an artifact.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tokopt
from tests.lower.encoders import vision
from tokopt import EngineOptions
from tokopt.runtime.numerics import check_output

pytest.importorskip("torch_tensorrt", reason="it takes tokopt[torch-tensorrt]")

NMSE = 2e-3
"""Products in TF32 may choose other tokens and steps."""

OPTIONS = EngineOptions(profiles=("batch=1:5:8",), strict=True)


@pytest.mark.parametrize(
    "pipeline", ["", "tome{r=3}", "pitome{r=3}", "evit{keep=0.7}", "divprune{keep=0.7}", "int8"]
)
def test_it_computes_the_same(pipeline: str, tmp_path: Path) -> None:
    bundle = tokopt.optimize(vision(), pipeline)
    patches = torch.randn(5, 20, 12, generator=torch.Generator().manual_seed(0))
    wanted = bundle.main(patches)
    path = tokopt.export(bundle, tmp_path / "model.tokopt", target="torch-tensorrt", engine=OPTIONS)
    for compiled in (tokopt.compile(bundle, engine=OPTIONS), tokopt.open_compiled(path)):
        for (name, got), want in zip(compiled(patches.cuda()).items(), wanted, strict=True):
            check = check_output(name, want.numpy(), got.cpu().numpy(), NMSE)
            assert check.ok, check
