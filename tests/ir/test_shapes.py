"""Sizes as functions of the named axes."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
from sympy.logic.boolalg import Boolean
from torch.utils._sympy import functions

from tokopt.ir.shapes import _at

SIZE: Any = sympy.Symbol("s0", integer=True, positive=True)
TORCH: Any = functions
"""torch's own functions of sizes, which say nothing of their types."""


@pytest.mark.parametrize(
    "expr",
    [
        sympy.Eq(TORCH.FloorDiv(SIZE + 3, 4) * 4, SIZE + 1),
        sympy.Ne(TORCH.Mod(SIZE, 2), 0),
        sympy.Le(TORCH.PythonMod(SIZE, 3), SIZE // 2),
        sympy.And(SIZE > 2, SIZE < 9),
        sympy.Gt(TORCH.Where(SIZE > 2, SIZE, 1), 1),
        sympy.Gt(TORCH.RoundToInt(TORCH.ToFloat(SIZE) * 0.5), 2),
        sympy.Eq(TORCH.Max(SIZE, 7), SIZE),
        TORCH.Min(SIZE, 7),
        TORCH.CeilDiv(SIZE, 4),
        TORCH.TruncToInt(TORCH.FloatTrueDiv(TORCH.ToFloat(SIZE), 2.0)),
        TORCH.CeilToInt(TORCH.ToFloat(SIZE - 1) * 0.8),
        SIZE**2 - TORCH.FloorDiv(SIZE, 2),
    ],
    ids=str,
)
def test_what_is_computed_at_every_size_is_what_sympy_says(expr: Any) -> None:
    sizes = range(2, 60)
    wanted = [expr.xreplace({SIZE: sympy.Integer(size)}) for size in sizes]
    assert [int(value) for value in _at(expr, SIZE, sizes)] == [
        int(x == sympy.true if isinstance(expr, Boolean) else x) for x in wanted
    ]
