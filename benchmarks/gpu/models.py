"""Merged vision transformers end to end in float16, executed by torch with the CUDA ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokopt
from benchmarks.gpu.ops import Row
from benchmarks.gpu.timing import milliseconds
from tokopt.ir.assemble import assemble
from tokopt.kernels import ops
from tokopt.measure.timing import module_on

MODELS = {
    "ViT-L/16, 224 px": (24, 1024, 16, 16, 224, 8),
    "DINOv2 ViT-S/14 sizes, 518 px": (12, 384, 6, 14, 518, 40),
}
"""Blocks, channels, heads, patch, image, and r per block: ToMe's schedule for ViT-L removes 8 in each of 24."""

BATCHES = (1, 8, 64)


def rows(name: str) -> Iterator[Row]:
    """A measurement for every batch.

    Weights are random and of the model's sizes, on which time does not depend; fidelity is that of benchmarks.vision.
    """
    blocks, channels, heads, patch, size, r = MODELS[name]
    model = vit(blocks, channels, heads, patch, size).half()
    bundle = tokopt.capture(model, (torch.randn(2, 3, size, size, dtype=torch.float16),))
    texts = ("", f"tome{{r={r}}}")
    programs = {text: module_on(assemble(tokopt.optimize(bundle, text).main), "cuda") for text in texts}
    eager = model.cuda()
    tokens = (size // patch) ** 2 + 1

    def measure(batch: int) -> dict[str, Any]:
        images = torch.randn(batch, 3, size, size, device="cuda", dtype=torch.float16)
        calls = {text or "unmerged": _call(module, images) for text, module in programs.items()}
        calls["eager, unmerged"] = _call(eager, images)
        found = milliseconds(calls)
        merged = found[f"tome{{r={r}}}"]
        overhead = milliseconds({"match": _matches(batch, tokens, channels, heads, r, blocks)})
        return {
            "model": name,
            "batch": batch,
            **{f"{text.split('{')[0]}, ms": value for text, value in found.items()},
            "times unmerged": found["unmerged"] / merged,
            "times eager": found["eager, unmerged"] / merged,
            "match and merge, share": overhead["match"] / merged,
        }

    for batch in BATCHES:
        yield f"batch {batch}", partial(measure, batch)


def vit(blocks: int, channels: int, heads: int, patch: int, size: int) -> torch.nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=channels,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=4 * channels,
        patch_size=patch,
        image_size=size,
    )
    torch.manual_seed(0)
    return ViTModel(config, add_pooling_layer=False).eval().requires_grad_(False)


def _call(module: Callable[[Tensor], object], images: Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: module(images))


def _matches(batch: int, tokens: int, channels: int, heads: int, r: int, blocks: int) -> Any:
    """All the matching and merging of a model, alone."""
    inputs = []
    for block in range(blocks):
        count = tokens - block * r
        metric = torch.randn(batch, count, channels // heads, device="cuda", dtype=torch.float16)
        x = torch.randn(batch, count, channels, device="cuda", dtype=torch.float16)
        inputs.append((metric, x, torch.ones(batch, count, device="cuda")))

    def run() -> None:
        for metric, x, size in inputs:
            ops.merge_tokens(x, size, *ops.bipartite_match(metric, size, r, 1))

    return run
