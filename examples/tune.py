"""Find the fastest pipeline that is good enough, on this machine: ``python examples/tune.py [dinov2|smollm2]``.

DINOv2 ViT-S/14 on real photographs at a cosine of at least 0.99, or SmolLM2-135M on Python's documentation at a KL
divergence of at most 0.05. What is measured is kept in the folder ``tuned-<model>``; the same command goes on there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokopt
from examples.data import class_feature, dinov2_small, photograph_views, smollm2
from tokopt.runtime.text import Tokenizer

CANDIDATES = {
    "dinov2": (
        ("tome{target=0.5}", "tome{target=0.25}"),
        ("int8", "smoothquant,int8{activations=static}"),
    ),
    "smollm2": (("keep_grid", "rtn{bits=8}", "rtn"),),
}
TOKENS, TEXTS = 512, 12


def photographs(size: int) -> tuple[tokopt.Bundle, list[np.ndarray]]:
    """DINOv2's class features, and photographs [1, 3, size, size]."""
    views = photograph_views(size)
    model = class_feature(dinov2_small(size))
    return tokopt.capture(model, (torch.from_numpy(views[:2]),)), [view[None] for view in views]


def documentation() -> tuple[tokopt.Bundle, list[list[int]]]:
    """SmolLM2, and windows of the documentation of Python's standard library."""
    bundle = tokopt.capture_lm(smollm2())
    assert bundle.tokenizer is not None and bundle.generation is not None
    ids = Tokenizer(bundle.tokenizer, bundle.generation.vocabulary).encode(library_text())
    starts = np.linspace(0, len(ids) - TOKENS, TEXTS).astype(int)
    return bundle, [ids[start : start + TOKENS] for start in starts]


def library_text() -> str:
    """The docstrings of some modules of Python's standard library, and of their classes."""
    import argparse
    import datetime
    import decimal
    import doctest
    import pickletools
    import statistics
    import typing
    import unittest

    modules = (argparse, datetime, decimal, doctest, pickletools, statistics, typing, unittest)
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    texts = [documented.__doc__ for documented in (*modules, *classes)]
    return "\n".join(text for text in texts if isinstance(text, str))  # some classes describe theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(CANDIDATES), nargs="?", default="dinov2")
    parser.add_argument("--size", type=int, default=224, help="pixels per side (default: 224)")
    parser.add_argument("--folder", type=Path, help="default: tuned-<model>")
    parser.add_argument("--minutes", type=float, default=20.0)
    options = parser.parse_args()
    bundle, samples = photographs(options.size) if options.model == "dinov2" else documentation()
    found = tokopt.tune(
        bundle,
        samples,
        options.folder or f"tuned-{options.model}",
        candidates=CANDIDATES[options.model],
        minutes=options.minutes,
        progress=print,
    )
    for trial in found.trials:
        quality = trial.quality.get(found.floor.measure)
        outcome = trial.reason or f"{trial.speedup:.2f}x at {found.floor.measure} {quality:.4f}"
        print(f"{trial.text:48} {outcome}")
    print("best:", found.winner.text if found.winner else f"no gain at {found.floor}")


if __name__ == "__main__":
    main()
