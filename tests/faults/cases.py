"""What the lists of arguments are made of: a call, values that it must refuse, and values that it must take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tokopt
from tokopt.runtime import LanguageModel, Model


@dataclass(frozen=True)
class Stage:
    """What the calls work on: a model that speaks, an encoder, and a captured module with its example."""

    speaker: LanguageModel
    encoder: Model
    module: torch.nn.Module
    x: torch.Tensor
    bundle: tokopt.Bundle
    folder: Path

    @property
    def fresh(self) -> Path:
        """A place where nothing is."""
        return self.folder / f"new-{len(list(self.folder.iterdir()))}"


Call = Callable[[Stage, Any], object]


@dataclass(frozen=True)
class Argument:
    """One argument of a call: the values that are refused, and those that are taken."""

    call: Call
    bad: Sequence[Any]
    good: Sequence[Any] = ()


def spelled(value: object) -> str:
    """A value in a few characters."""
    return f"{type(value).__name__} {' '.join(repr(value).split())[:40]}"
