"""The intermediate representation: Program, State, Bundle.

A :class:`Program` is one ``torch.export.ExportedProgram`` in tokopt's flat calling convention (positional
tensors in, a tuple of tensors out) with a name, a role and named axes for every input and output. A
:class:`Bundle` holds named programs that share weights and state. An encoder is a bundle with the one program
``"forward"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from tokopt.passes.reduction import TokenReduction
    from tokopt.runtime.manifest import Generation

Axis = str | int
"""A named (dynamic) axis, or the size of a static one."""

Role = Literal["input", "tokens", "positions", "mask", "state", "output", "logits", "score"]

Semantics = Literal["exact", "lossless", "approximate"]
"""``exact``: equal within floating-point tolerance. ``lossless``: same output distribution. ``approximate``."""

_STRENGTH: tuple[Semantics, ...] = ("exact", "lossless", "approximate")  # strongest first


def weakest(classes: list[Semantics]) -> Semantics:
    """The weakest of several semantics classes; ``exact`` for none.

    >>> weakest(["exact", "approximate", "lossless"])
    'approximate'
    """
    return max(classes, key=_STRENGTH.index) if classes else "exact"


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
class State:
    """A tensor that the caller feeds back on the next call.

    ``output`` names the program output that becomes the input ``name`` of the next call. ``in_place``: in
    the main program the output is the input with new entries written into it, so one buffer may serve as both.
    """

    name: str
    dtype: str
    axes: tuple[Axis, ...]
    output: str
    initial: float = 0.0
    in_place: bool = False


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


@dataclass(frozen=True)
class AppliedPass:
    """One line of a bundle's history: the pass's text, how many sites it changed, and its notes."""

    text: str
    matches: int
    semantics: Semantics
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bundle:
    """Named programs that share weights and state, and the list of passes that made them.

    ``task`` is ``"encoder"`` or ``"causal-lm"``; ``tokenizer`` is the text of a ``tokenizer.json``;
    ``generation`` is there for ``"causal-lm"``.
    """

    programs: Mapping[str, Program]
    task: Literal["encoder", "causal-lm"] = "encoder"
    states: tuple[State, ...] = ()
    history: tuple[AppliedPass, ...] = ()
    tokenizer: str | None = None
    generation: Generation | None = None

    @property
    def forward(self) -> Program:
        """The one program of an encoder bundle."""
        return self.programs["forward"]

    @property
    def main(self) -> Program:
        """The program that does the work: ``forward`` of an encoder, ``step`` of a language model."""
        return self.programs["forward" if self.task == "encoder" else "step"]

    @property
    def semantics(self) -> Semantics:
        """The weakest class among the passes that changed something."""
        return weakest([step.semantics for step in self.history if step.matches])

    @property
    def pipeline(self) -> str:
        """The text of the pipeline that made this bundle, for example ``"tome{r=16}"``."""
        return ",".join(step.text for step in self.history)

    def with_program(self, name: str, program: Program) -> Bundle:
        """A copy of this bundle in which ``name`` is ``program``."""
        return replace(self, programs={**self.programs, name: program})

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run ``forward``."""
        return self.forward(*tensors)
