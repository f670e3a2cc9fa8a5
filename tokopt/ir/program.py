"""A Program: one graph in tokopt's flat calling convention, and the meaning of what goes in and comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokopt.runtime.format.signature import Axis
from tokopt.runtime.format.signature import Range as AxisRange
from tokopt.runtime.format.signature import Tensor as TensorSpec

__all__ = ["Axis", "AxisRange", "Program", "Reductions", "TensorSpec"]

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule


@dataclass(frozen=True)
class Program:
    """One graph and the meaning of what goes in and comes out.

    ``module`` takes ``len(inputs)`` positional tensors and returns a tuple of ``len(outputs)`` tensors. Its parameters
    are attributes, and every node has its value's shape and dtype in ``meta["val"]``. It is never changed in place:
    passes edit a copy (:func:`tokopt.rewrite.edit.open_graph`). ``ranges`` gives the sizes of every named axis.
    ``aliases`` maps outputs to inputs: the output is that input with new entries written into it, so that a host binds
    one buffer to both; several outputs may alias one input.
    ``example`` holds one tuple of inputs that fits, used for the export, numeric comparison and the artifact's
    self-test. ``reductions`` lives in memory only: the program before any token reduction and the passes since, so that
    a further reduction joins the same rewrite.
    """

    module: GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: Mapping[str, AxisRange]
    example: tuple[torch.Tensor, ...]
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    reductions: Reductions | None = field(default=None, compare=False, repr=False)

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the graph on positional tensors, without gradients."""
        import torch

        with torch.no_grad():
            return self.module(*tensors)


@dataclass(frozen=True)
class Reductions:
    """A program before any token was removed, and the token reductions applied to it, in order.

    ``later`` are the passes that ran since and would do the same to ``base``.
    """

    base: Program
    methods: tuple[object, ...]
    later: tuple[object, ...] = ()
