"""Sizes as functions of the named axes."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
from sympy.logic.boolalg import Boolean
from torch.utils._sympy import functions

from tokopt.errors import PassError
from tokopt.ir.program import AxisRange
from tokopt.ir.shapes import _at, _holding

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


ROWS: Any = sympy.Symbol("s1", integer=True, positive=True)
FRAMES: Any = TORCH.FloorDiv(TORCH.FloorDiv(SIZE, 80) - 3, 2)
"""What convolutions leave of a sound."""

AXES, RANGES = {SIZE: "frames", ROWS: "batch"}, {"frames": AxisRange(480, None), "batch": AxisRange()}


@pytest.mark.parametrize(
    "expr",
    [
        sympy.Eq(TORCH.Mod(4 * ROWS * (FRAMES + 1), 4 * FRAMES + 4), 0),
        sympy.Eq(ROWS, 1) | sympy.Eq(TORCH.Mod(ROWS * FRAMES + FRAMES, FRAMES), 0),
        (FRAMES + 4 > 0) & sympy.Eq(TORCH.Mod(ROWS * (FRAMES + 1) ** 2, FRAMES + 1), 0),
    ],
    ids=str,
)
def test_that_a_size_divides_its_multiples_is_proved_for_all_sizes(expr: Any) -> None:
    assert _holding(expr, AXES, RANGES) == RANGES


@pytest.mark.parametrize(
    "expr",
    [
        sympy.Eq(TORCH.Mod(2 * ROWS * (FRAMES + 1), 4 * FRAMES + 4), 0),
        sympy.Eq(TORCH.Mod(ROWS * FRAMES + 1, FRAMES), 0),
        (ROWS > FRAMES) | sympy.Eq(TORCH.Mod(ROWS, FRAMES + 1), 0),
        (ROWS > 1) & sympy.Eq(TORCH.Mod(ROWS, FRAMES + 1), 0),
    ],
    ids=str,
)
def test_what_holds_for_some_sizes_of_two_axes_is_refused_in_plain_words(expr: Any) -> None:
    with pytest.raises(
        PassError, match=r"an edit fits only some sizes of the axes 'batch' and 'frames', .* one of them"
    ) as caught:
        _holding(expr, AXES, RANGES)
    assert "Mod" not in str(caught.value)
