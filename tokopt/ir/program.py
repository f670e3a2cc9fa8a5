"""A Program: one exported graph in tokopt's flat calling convention, and the meaning of what goes in and comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from tokopt.passes.reduce.base import TokenReduction

Axis = str | int
"""A named (dynamic) axis, or the size of a static one."""

Role = Literal["input", "tokens", "positions", "mask", "state", "output", "logits", "score"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (numpy spelling, ``"float32"``), axes and role of one input or output."""

    name: str
    dtype: str
    axes: tuple[Axis, ...]
    role: Role = "input"


@dataclass(frozen=True)
class AxisRange:
    """The sizes that a named axis may take, both ends included; ``max`` is None when unbounded."""

    min: int = 1
    max: int | None = None


@dataclass(frozen=True)
class Program:
    """One exported graph and the meaning of what goes in and comes out.

    ``exported`` takes ``len(inputs)`` positional tensors and returns a tuple of ``len(outputs)`` tensors.
    ``ranges`` gives the sizes of every named axis. ``example`` holds one tuple of inputs that fits, used for
    re-export, numeric comparison and the artifact's self-test. ``reductions`` lives in memory only: the program
    before any token reduction and the passes since, so that a further reduction joins the same rewrite.
    """

    exported: ExportedProgram
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: Mapping[str, AxisRange]
    example: tuple[torch.Tensor, ...]
    reductions: Reductions | None = field(default=None, compare=False, repr=False)

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the exported graph on positional tensors, without gradients."""
        import torch

        with torch.no_grad():
            return self.exported.module(check_guards=False)(*tensors)


@dataclass(frozen=True)
class Reductions:
    """A program before any token was removed, and the token reductions applied to it, in order."""

    base: Program
    methods: tuple[TokenReduction, ...]
