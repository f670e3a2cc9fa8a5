"""The token picture: groups partition the tokens as the reductions say, and the drawing shows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tokopt
from tests.matrix.test_matrix import captured
from tokopt.errors import InputError
from tokopt.measure.picture import PRUNED, save_picture, token_groups, token_picture

Image = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize("name", ["tome", "pitome", "evit"])
def test_merging_leaves_every_token_in_a_group(name: str) -> None:
    """37 tokens, 4 fewer per block: 33, 29, 25 groups, and two tokens once together stay together."""
    bundle = tokopt.optimize(captured("vit"), f"{name}{{r=4}}", strict=True)
    stages = token_groups(bundle.main, *bundle.main.example)
    counts = [len(set(stage[0]) - {PRUNED}) for stage in stages]
    assert counts == ([33, 29, 25] if name != "evit" else [33, 29, counts[-1]])
    for earlier, later in zip(stages[0][0], stages[1][0], strict=True):
        same = stages[0][0] == earlier
        assert (stages[1][0][same] == later).all()
    assert all(stage[0][0] == 0 for stage in stages)  # the class token keeps its slot


def test_pruned_tokens_are_marked() -> None:
    bundle = tokopt.optimize(captured("vit"), "random{r=4}", strict=True)
    stages = token_groups(bundle.main, *bundle.main.example)
    assert [int((stage[0] == PRUNED).sum()) for stage in stages] == [4, 8, 12]


def test_a_program_that_keeps_all_tokens_has_no_picture() -> None:
    with pytest.raises(InputError, match="reduces no tokens"):
        token_groups(captured("vit").main, *captured("vit").main.example)


def test_a_group_is_drawn_in_its_mean_colour_and_pruned_patches_dark(tmp_path: Path) -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, :20], pixels[:, 20:] = (200, 0, 0), (0, 0, 100)
    groups = np.array([0, 1, 1, 2, PRUNED])  # one special token, then a 2 x 2 grid: top row merged
    picture = token_picture(Image.fromarray(pixels), [groups], prefix=1, width=40)
    path = save_picture(picture, tmp_path / "tokens.png")
    panel = np.asarray(Image.open(path))[22:, 48:]
    assert tuple(panel[10, 10]) == tuple(panel[10, 30]) == (100, 0, 50)
    assert tuple(panel[30, 10]) == (200, 0, 0)
    assert panel[30, 30].max() <= 16
    with pytest.raises(InputError, match="no square grid"):
        token_picture(Image.fromarray(pixels), [groups], prefix=2)
