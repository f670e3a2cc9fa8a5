"""Heads, labels and adapters that users bring, as safetensors files; every fault is one sentence."""

# safetensors leaves the types of paths open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tokopt.errors import PassError
from tokopt.passes.exit.heads import Affine


@dataclass(frozen=True)
class Loaded:
    """The head and temperature of every exit."""

    heads: list[Affine]
    temperatures: list[float]


def read_heads(path: str, after: Sequence[int], own: Affine) -> Loaded:
    """Heads from ``3.weight``, ``3.bias`` and perhaps ``3.temperature``, of the sizes that the model's ``own`` has."""
    tensors = Tensors.read("exit", path)
    wanted = {"weight": tuple(own.weight.shape), "bias": tuple(own.bias.shape)}
    heads: list[Affine] = []
    temperatures: list[float] = []
    for depth in after:
        parts = [tensors.take(f"{depth}.{word}", shape) for word, shape in wanted.items()]
        heads.append(Affine(parts[0].float(), parts[1].float()))
        name = f"{depth}.temperature"
        given = float(tensors.take(name, ()).item()) if tensors.has(name) else 1.0
        if not (given > 0 and math.isfinite(given)):
            raise PassError(f"exit: {name!r} of {path} is {given}; a temperature is above 0")
        temperatures.append(given)
    return Loaded(heads, temperatures)


def read_labels(path: str, count: int, classes: int) -> Tensor:
    """The class [rows] int64 of every calibration input, from the tensor ``labels``."""
    labels = Tensors.read("exit", path).take("labels", (count,))
    if labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise PassError(f"exit: 'labels' of {path} must be numbers of classes from 0 to {classes - 1}")
    return labels.long()


@dataclass(frozen=True)
class Tensors:
    """The tensors of a file that was given to the pass of a name."""

    owner: str
    path: str
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, owner: str, path: str) -> Tensors:
        """The file at a path; raises PassError."""
        try:
            return cls(owner, path, load_file(Path(path)))
        except (OSError, SafetensorError) as error:
            raise PassError(f"{owner}: {path} cannot be read ({error}); give a safetensors file") from error

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self.tensors

    def rows(self, name: str) -> int:
        """The size of the first axis of a matrix; 0 where there is none."""
        found = self.tensors.get(name)
        return 0 if found is None or found.ndim != 2 else found.shape[0]

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor that must be there, finite and of this shape; raises PassError."""
        found = self.tensors.get(name)
        if found is None or tuple(found.shape) != shape:
            what = "no such tensor" if found is None else f"one of shape {list(found.shape)}"
            raise PassError(
                f"{self.owner}: {self.path} must have {name!r} of shape {list(shape)}, and has {what}"
            )
        if found.is_floating_point() and not bool(torch.isfinite(found).all()):
            raise PassError(f"{self.owner}: {name!r} of {self.path} holds NaN or infinity")
        return found
