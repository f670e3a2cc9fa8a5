"""The token picture: a photograph whose patches are filled by the group they were merged into.

After Bolya et al. (ToMe, arXiv 2210.09461, figure 4): one panel per reduction, merged patches in the mean colour of
their group with the group's outline, pruned patches dark. Needs Pillow (``pip install tokopt[viz]``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from tokopt.arguments import check_path
from tokopt.errors import InputError, MissingDependencyError
from tokopt.ir.program import Program
from tokopt.kernels import declared
from tokopt.place import writing

if TYPE_CHECKING:
    from PIL.Image import Image

PRUNED = -1
"""The group of a token that was dropped."""


def token_groups(program: Program, *inputs: torch.Tensor) -> list[NDArray[np.int64]]:
    """The group of every original token after each reduction of ``program``, in order.

    Each entry is [batch, tokens] int64: the slot that stands for the token, :data:`PRUNED` when it was dropped.
    Raises InputError when the program reduces no tokens.
    """
    selections = _selections(program, inputs)
    if not selections:
        raise InputError("the program reduces no tokens; optimize it with a merge or prune pass first")
    first = selections[0]
    groups = np.tile(np.arange(first[0].shape[1] + first[1].shape[1]), (first[0].shape[0], 1))
    found = []
    for i, selection in enumerate(selections):
        following = selections[i + 1] if i + 1 < len(selections) else None
        groups = _follow(groups, selection, following)
        found.append(groups)
    return found


def _selections(program: Program, inputs: tuple[torch.Tensor, ...]) -> list[tuple[NDArray[np.int64], ...]]:
    """(keep, drop) or (keep, drop, dest) of every selection op, in the order of execution."""
    found: list[tuple[NDArray[np.int64], ...]] = []

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            op = declared(n.target)
            if op is not None and op.choice is not None and op.choice.prefix is not None:
                found.append(tuple(part.numpy() for part in value))
            return value

    with torch.no_grad():
        Recorder(program.module).run(*inputs)
    return found


def _follow(
    groups: NDArray[np.int64],
    selection: tuple[NDArray[np.int64], ...],
    following: tuple[NDArray[np.int64], ...] | None,
) -> NDArray[np.int64]:
    keep, drop = selection[:2]
    slot = np.full((keep.shape[0], keep.shape[1] + drop.shape[1] + 1), PRUNED)
    rows = np.arange(keep.shape[0])[:, None]
    slot[rows, keep] = np.arange(keep.shape[1])
    fused = following is not None and following[0].shape[1] + following[1].shape[1] == keep.shape[1] + 1
    if len(selection) == 3:
        slot[rows, drop] = selection[2]
    elif fused:  # EViT's one token for all that was dropped
        slot[rows, drop] = keep.shape[1]
    return np.where(groups == PRUNED, PRUNED, slot[rows, groups])


def token_picture(
    photo: Image, groups: Sequence[NDArray[np.int64]], *, prefix: int, panels: int = 4, width: int = 320
) -> Image:
    """Photograph and, beside it, how its patches are grouped after some of the reductions.

    ``groups`` holds [tokens] or [batch, tokens] arrays of :func:`token_groups` (the first row is drawn); ``prefix``
    tokens are not patches. The patches must form a square grid.
    """
    Image, ImageDraw = _pillow()
    picked = np.unique(np.linspace(0, len(groups) - 1, min(panels, len(groups))).round().astype(int))
    rows = [np.atleast_2d(groups[i])[0] for i in picked]
    side = round(len(rows[0][prefix:]) ** 0.5)
    if side * side != len(rows[0]) - prefix:
        raise InputError(
            f"{len(rows[0]) - prefix} patches form no square grid; set prefix to the special tokens"
        )
    photo = photo.convert("RGB").resize((width, width))
    sheet = Image.new("RGB", ((width + 8) * (len(rows) + 1) - 8, width + 22), "white")
    pen = ImageDraw.Draw(sheet)
    titles = ["photograph"] + [
        f"after reduction {i + 1}: {len(set(row[row != PRUNED]))} tokens"
        for i, row in zip(picked, rows, strict=True)
    ]
    panels_drawn = [photo] + [_panel(photo, row[prefix:].reshape(side, side)) for row in rows]
    for i, (title, panel) in enumerate(zip(titles, panels_drawn, strict=True)):
        sheet.paste(panel, (i * (width + 8), 22))
        pen.text((i * (width + 8) + 2, 5), title, fill="black")
    return sheet


def _panel(photo: Image, grid: NDArray[np.int64]) -> Image:
    Image, _ = _pillow()
    pixels = np.asarray(photo, dtype=np.float32)
    size, side = pixels.shape[0], grid.shape[0]
    cell = np.minimum(np.arange(size) * side // size, side - 1)
    group = grid[cell][:, cell]
    flat, index = group.reshape(-1), np.unique(group.reshape(-1), return_inverse=True)[1]
    sums = np.stack([np.bincount(index, pixels[..., c].reshape(-1)) for c in range(3)], 1)
    mean = (sums / np.bincount(index)[:, None])[index].reshape(pixels.shape)
    drawn = np.where((flat == PRUNED).reshape(group.shape)[..., None], pixels * 0.15, mean)
    edge = np.zeros_like(group, bool)
    edge[1:] |= group[1:] != group[:-1]
    edge[:, 1:] |= group[:, 1:] != group[:, :-1]
    drawn[edge] = np.clip(drawn[edge] * 0.4 + 150, 0, 255)
    return Image.fromarray(drawn.astype(np.uint8))


def save_picture(picture: Image, path: str | Path) -> Path:
    """Write a PNG through a temporary name."""
    path = check_path("path", path)
    with writing(path) as temporary:
        picture.save(temporary, format="PNG")
    return path


def _pillow():
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise MissingDependencyError("token pictures need Pillow; pip install tokopt[viz]") from error
    return Image, ImageDraw
