"""Sizes as functions of the named axes."""

from __future__ import annotations

import pytest
import sympy
from sympy.logic.boolalg import Boolean
from torch.utils._sympy.functions import (
    CeilDiv,
    CeilToInt,
    FloatTrueDiv,
    FloorDiv,
    Max,
    Min,
    Mod,
    PythonMod,
    RoundToInt,
    ToFloat,
    TruncToInt,
    Where,
)

from tokopt.ir.shapes import _at

SIZE = sympy.Symbol("s0", integer=True, positive=True)


@pytest.mark.parametrize(
    "expr",
    [
        sympy.Eq(FloorDiv(SIZE + 3, 4) * 4, SIZE + 1),
        sympy.Ne(Mod(SIZE, 2), 0),
        sympy.Le(PythonMod(SIZE, 3), SIZE // 2),
        sympy.And(SIZE > 2, SIZE < 9),
        sympy.Gt(Where(SIZE > 2, SIZE, 1), 1),
        sympy.Gt(RoundToInt(ToFloat(SIZE) * 0.5), 2),
        sympy.Eq(Max(SIZE, 7), SIZE),
        Min(SIZE, 7),
        CeilDiv(SIZE, 4),
        TruncToInt(FloatTrueDiv(ToFloat(SIZE), 2.0)),
        CeilToInt(ToFloat(SIZE - 1) * 0.8),
        SIZE**2 - FloorDiv(SIZE, 2),
    ],
    ids=str,
)
def test_what_is_computed_at_every_size_is_what_sympy_says(expr: sympy.Basic) -> None:
    sizes = range(2, 60)
    wanted = [expr.xreplace({SIZE: sympy.Integer(size)}) for size in sizes]
    assert [int(value) for value in _at(expr, SIZE, sizes)] == [
        int(x == sympy.true if isinstance(expr, Boolean) else x) for x in wanted
    ]
