"""PiToMe was Algorithm 1 in all blocks; the published results for vision transformers use another matcher in half.

The law: both matchings give the pairs computed by hand from the paper's energies, and ``matching`` says which block
has which. The whole pass equals the eager reference.
"""

from __future__ import annotations

from fractions import Fraction
from math import cos, sin

import pytest
import torch

import tokopt
from tests.matrix.eager import run_eager
from tests.matrix.test_matrix import captured
from tests.zoo import ZOO
from tokopt.errors import TokoptError
from tokopt.kernels import ops
from tokopt.passes.reduce.pitome import PiToMe

ANGLES = [0.0, 0.10, 0.25, 0.45, 1.50, 1.51, 2.60, 3.00]
METRIC = torch.tensor([[[cos(x), sin(x)] for x in ANGLES]])
MARGIN = 0.75

ALGORITHM1 = {1: {(2, 3)}, 2: {(0, 1), (2, 3)}}
BIPARTITE = {1: {(4, 5)}, 2: {(4, 5), (0, 1)}, 3: {(4, 5), (0, 1), (2, 3)}}
"""Tokens removed -> the pairs that merge, of energies in the order 3, 2, 1, 0, 4, 5, 6, 7."""


def pairs(match: tuple[torch.Tensor, ...]) -> set[tuple[int, ...]]:
    keep, drop, dest = match
    joined = zip(drop[0].tolist(), keep.gather(1, dest)[0].tolist(), strict=True)
    return {tuple(sorted(pair)) for pair in joined}


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize(
    ("op", "wanted"), [("energy_match", ALGORITHM1), ("energy_bipartite_match", BIPARTITE)]
)
def test_pairs_are_those_of_the_formulas(op: str, wanted: dict[int, set], prefix: int) -> None:
    """Also behind protected tokens, however many."""
    metric = torch.cat([torch.ones(1, prefix, 2), METRIC], dim=1)
    for r, expected in wanted.items():
        found = pairs(getattr(ops, op)(metric, torch.ones(metric.shape[:2]), r, prefix, MARGIN))
        assert found == {(a + prefix, b + prefix) for a, b in expected}


def test_sides_are_even_and_odd_ranks() -> None:
    """A = 3, 1, 4, 6 and B = 2, 0, 5, 7: with r = 3 the tokens 4, 1 and 3 leave, best edge first."""
    keep, drop, _ = ops.energy_bipartite_match(METRIC, torch.ones(1, 8), 3, 0, MARGIN)
    assert drop.tolist() == [[4, 1, 3]] and keep.tolist() == [[6, 2, 0, 5, 7]]


@pytest.mark.parametrize(
    ("matching", "blocks"),
    [("deit", "110"), ("mae", "001"), ("bipartite", "111"), ("algorithm1", "000")],
)
def test_matching_says_which_block_has_which(matching: str, blocks: str) -> None:
    """Of three blocks, the larger first half is two."""
    reduced = tokopt.optimize(captured("vit"), f"pitome{{r=2 matching={matching}}}")
    called = [str(node.target) for node in reduced.main.module.graph.nodes]
    found = [target for target in called if "energy" in target]
    assert found == [
        "tokopt.energy_bipartite_match.default" if block == "1" else "tokopt.energy_match.default"
        for block in blocks
    ]


def test_the_default_is_the_form_for_vision_transformers() -> None:
    assert tokopt.parse("pitome{r=2}").passes == tokopt.parse("pitome{r=2 matching=deit}").passes


@pytest.mark.parametrize("matching", ["mae", "bipartite"])
def test_the_pass_equals_the_eager_reference(matching: str) -> None:
    """Without proportional attention too, as in the published code for classification."""
    entry, counts = ZOO["vit"], [4, 0, 3]
    for proportional in (True, False):
        text = f"pitome{{r=[4,0,3] matching={matching} proportional={str(proportional).lower()}}}"
        options = {"prefix": 1, "proportional": proportional}
        with torch.no_grad():
            wanted = run_eager("vit", entry.build(), entry.inputs(), f"pitome_{matching}", counts, options)
        for got, expected in zip(
            tokopt.optimize(captured("vit"), text)(*entry.inputs().values()), wanted.values(), strict=True
        ):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_the_published_ratio_leaves_the_published_count() -> None:
    """196 patches at a ratio of 0.9125 in each of 12 blocks: 68 are left."""
    left = 196
    for _ in range(12):
        left = PiToMe(keep=0.9125).kept(Fraction(0.9125), left)
    assert left == 68


def test_another_matching_is_refused() -> None:
    with pytest.raises(TokoptError, match="matching"):
        tokopt.parse("pitome{r=2 matching=clip}")
