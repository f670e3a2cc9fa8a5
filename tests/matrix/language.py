"""Artifacts of the decoder zoo, exported once per run."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tokopt
from tests.shared import once
from tests.zoo.decoders import DECODERS, VOCABULARY
from tokopt.frontend.language import capture_lm
from tokopt.ir.bundle import Bundle
from tokopt.runtime import LanguageModel, load


@cache
def model(name: str) -> torch.nn.Module:
    return DECODERS[name]()


@cache
def bundle(name: str) -> Bundle:
    return capture_lm(model(name), generation=getattr(model(name), "generation", None))


@cache
def artifact(name: str, passes: str = "") -> LanguageModel:
    """The artifact of a decoder after ``passes``, which tests only read."""

    def export(path: Path) -> None:
        made = tokopt.optimize(bundle(name), passes) if passes else bundle(name)
        tokopt.export(made, path, target="onnx")
        assert tokopt.verify(path).ok  # of every artifact that export writes

    key = hashlib.sha256(passes.encode()).hexdigest()[:12]
    return load(once(f"{name}-{key}.tokopt", export), threads=1)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def reference(name: str, ids: list[int], count: int) -> list[int]:
    """Greedy tokens of the model itself: transformers' ``generate``, or the whole text again every time."""
    decoder: Any = model(name)
    if hasattr(decoder, "greedy"):
        return decoder.greedy(ids, count)
    with torch.no_grad():
        made = decoder.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return made[0, len(ids) :].tolist()
