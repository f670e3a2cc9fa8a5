"""How alike the tokens are that a merging pass pairs up, block by block.

``python -m benchmarks.pairs`` feeds the keys of the unmerged DINOv2-S/14 at 224 px on the photographs to the
matchings of ToMe and PiToMe and writes the mean cosine of the pairs to ``benchmarks/results/pairs.md``. It says why
Algorithm 1 of PiToMe needs large cuts: of ``2r`` tokens it merges every second one into one of the others, however few
they are, while the two bipartite matchings take the best ``r`` pairs of all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.data import dinov2_small, photograph_views, write_atomically
from tokopt.kernels import ops
from tokopt.kernels.shared import rows, unit

RESULT = Path(__file__).parent / "results" / "pairs.md"
SIZE, CUTS, MARGIN = 224, (16, 77), 0.75
"""Image size; tokens merged in a block; PiToMe's margin in the first block."""


def keys_by_block(model: nn.Module, images: Tensor, heads: int) -> list[Tensor]:
    """Keys averaged over heads [images, tokens, channels] of every block."""
    found: list[Tensor] = []

    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        found.append(output.unflatten(-1, (heads, -1)).mean(dim=2))

    hooks = [m.register_forward_hook(note) for name, m in model.named_modules() if name.endswith("k_proj")]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


def likeness(keys: Tensor, match: tuple[Tensor, Tensor, Tensor]) -> float:
    """Mean cosine of the tokens that merge and those they merge into."""
    keep, drop, dest = match
    direction = unit(keys)
    return float((rows(direction, drop) * rows(direction, keep.gather(1, dest))).sum(dim=-1).mean())


def table(keys: list[Tensor]) -> str:
    """One line per block: all pairs, then those of ToMe and of PiToMe's two matchings at each cut."""
    names = [f"{name}, r={r}" for r in CUTS for name in ("tome", "pitome, bipartite", "pitome, algorithm1")]
    lines = ["| block | any two tokens | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for block, metric in enumerate(keys):
        size = torch.ones(metric.shape[:2])
        direction = unit(metric[:, 1:])
        cells = [float((direction @ direction.mT).mean())]
        for r in CUTS:
            margin = MARGIN * (1 - block / len(keys))
            cells.append(likeness(metric, ops.bipartite_match(metric, size, r, 1)))
            matches = (ops.energy_bipartite_match, ops.energy_match)
            cells.extend(likeness(metric, match(metric, size, r, 1, margin)) for match in matches)
        lines.append(f"| {block} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table and write it."""
    model: Any = dinov2_small(SIZE)
    keys = keys_by_block(model, torch.from_numpy(photograph_views(SIZE)), model.config.num_attention_heads)
    text = "Mean cosine of the keys that are merged; `python -m benchmarks.pairs`.\n\n" + table(keys)
    print(text)
    RESULT.parent.mkdir(exist_ok=True)
    write_atomically(RESULT, lambda path: path.write_text(text))


if __name__ == "__main__":
    main()
