"""DivPrune's ``keep`` was rounded up; the publication rounds to the nearest count, as Python does.

The law: the count is ``round(keep * tokens)``; of a dynamic number of tokens a half goes down.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

import tokopt
from tests.faults.test_24_evit_keep import lengths
from tests.matrix.test_matrix import captured
from tokopt.errors import PassError
from tokopt.passes.reduce.divprune import DivPrune


@pytest.mark.parametrize(("tokens", "left"), [(576, 56), (196, 19), (64, 6)])
def test_the_published_ratio(tokens: int, left: int) -> None:
    assert DivPrune(keep=0.098).kept(Fraction("0.098"), tokens) == left
    if tokens < 200:
        text = "divprune{keep=0.098 layers=[0] prefix=1}"
        assert lengths(tokens + 1, text)[1] == left + 1


def test_halves_go_to_the_even_count() -> None:
    """As ``int(round(ratio * n))`` of the publication's Python: 0.5, 1.5, 2.5, 3.5 are 0, 2, 2, 4."""
    kept = [DivPrune(keep=0.5).kept(Fraction(1, 2), tokens) for tokens in range(9)]
    assert kept == [0, 0, 1, 2, 2, 2, 3, 4, 4] == [round(0.5 * tokens) for tokens in range(9)]


def test_nothing_left_is_a_typed_sentence() -> None:
    """Of 36 patches 0.01 is rounded to none, and a pruned token needs one that stands for it."""
    bundle = captured("vit")
    for text in ("divprune{keep=0.01 layers=[0]}", "kcenter{r=36 layers=[1]}", "random{r=36 layers=[2]}"):
        with pytest.raises(PassError, match=r"r=36 is too large for block \d .* can lose at most 35"):
            tokopt.optimize(bundle, text)


def test_a_dynamic_length_keeps_the_rounded_count() -> None:
    """The exported program computes the count from the length; at even ones 0.5 of the other tokens ends in a half."""
    bundle = captured("bert")
    reduced = tokopt.optimize(bundle, "divprune{keep=0.5 layers=[0] prefix=1}", strict=True)
    found: list[int] = []

    class Counter(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if "farthest_point" in str(n.target):
                found.append(value[0].shape[1])
            return value

    lengths = range(24, 34)
    for tokens in lengths:
        Counter(reduced.main.module).run(
            *(torch.ones(1, tokens, dtype=x.dtype) for x in reduced.main.example)
        )
    assert found == [1 + (tokens - 1) // 2 for tokens in lengths]
