"""The intermediate representation: Program, State, Bundle.

A :class:`Program` is one ``torch.export.ExportedProgram`` in tokopt's flat calling convention (positional
tensors in, a tuple of tensors out) with a name, a role and named axes for every input and output. A
:class:`Bundle` holds named programs that share weights and state. An encoder is a bundle with the one program
``"forward"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from tokopt.ir.program import Axis, Program
from tokopt.runtime.format import generation as runtime

if TYPE_CHECKING:
    import torch

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
class Generation(runtime.Generation):
    """What driving a causal language model takes beside its programs.

    ``compact_every`` > 0: run the program ``compact`` after the prompt and then after every so many tokens.
    ``endless``: positions are renumbered by ``compact``, so if no more than ``compact_every`` tokens are read in
    between, a text may outgrow ``context``.
    """

    compact_every: int = 0
    endless: bool = False


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
