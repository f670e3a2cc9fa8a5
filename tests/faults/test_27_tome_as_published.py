"""ToMe's decreasing schedule was rounded to nearest, and its proportional attention could not be turned off.

The laws: the schedule is truncated, as published; without proportional attention no attention adds ``log(size)``, and
the pass equals the eager reference without it, with padding too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import tokopt
from tests.faults.test_24_evit_keep import lengths
from tests.matrix.eager import run_eager
from tests.matrix.test_matrix import assert_close, captured
from tests.zoo import ZOO
from tokopt.errors import TokoptError
from tokopt.ir.bundle import Bundle
from tokopt.passes.reduce.base import _removals
from tokopt.passes.reduce.tome import ToMe


@pytest.mark.parametrize(
    ("r", "wanted"),
    [
        (8, (16, 10, 5, 0)),
        (16, (32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0)),
        (7, (14, 7, 0)),
        (1, (2, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0)),
        (3, (3,)),
    ],
)
def test_the_decreasing_schedule_truncates(r: int, wanted: tuple[int, ...]) -> None:
    blocks: list[Any] = [None] * len(wanted)
    assert _removals(ToMe(r=r, schedule="decreasing"), blocks) == wanted


@pytest.mark.parametrize("method", ["tome", "pitome", "random", "evit"])
def test_every_reduction_takes_the_truncated_counts(method: str) -> None:
    assert lengths(65, f"{method}{{r=8 schedule=decreasing prefix=1}}") == (65, 49, 39, 34)


def weighed(bundle: Bundle) -> int:
    """How many times ``log(size)`` is computed."""
    return sum("log_size" in str(node.target) for node in bundle.main.module.graph.nodes)


MODELS = ("vit", "siglip", "minilm")
"""A class token; a pooling head; mean pooling of padded text."""


@pytest.mark.parametrize("name", MODELS)
def test_without_proportional_attention_it_equals_the_eager_reference(name: str) -> None:
    entry, bundle = ZOO[name], captured(name)
    reduced = tokopt.optimize(bundle, "tome{r=[4,0,3] proportional=false}", strict=True)
    assert not weighed(reduced) and weighed(tokopt.optimize(bundle, "tome{r=[4,0,3]}"))
    inputs = entry.inputs()
    options = {"prefix": entry.prefix, "proportional": False}
    with torch.no_grad():
        wanted = tree_leaves(run_eager(name, entry.build(), inputs, "tome", [4, 0, 3], options))
    for got, expected in zip(reduced(*inputs.values()), wanted, strict=True):
        assert_close(entry, inputs, got, expected)


def test_attention_is_weighed_after_the_first_pass_that_wants_it() -> None:
    """Sizes are counted from the first merge on, whichever pass made it."""
    bundle = captured("vit")
    plain = "tome{r=4 layers=[0] proportional=false}"
    assert weighed(tokopt.optimize(bundle, f"{plain},tome{{r=4 layers=[1] proportional=false}}")) == 0
    assert weighed(tokopt.optimize(bundle, f"{plain},tome{{r=4 layers=[1]}}")) == 1
    assert weighed(tokopt.optimize(bundle, f"{plain},random{{r=4 layers=[1]}}")) == 0


def test_proportional_is_true_or_false() -> None:
    with pytest.raises(TokoptError, match=r"proportional.* wrong type"):
        tokopt.parse("tome{r=2 proportional=2}")
    with pytest.raises(TokoptError, match="no option 'proportional'"):
        tokopt.parse("random{r=2 proportional=false}")
