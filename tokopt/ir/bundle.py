"""A Bundle: named programs, the state they share, and what drives them.

Names carry no meaning. What a program is for says the schedule, what goes in and comes out say the roles of its
signature, and what a state holds says its kind; they are the data that the artifact's manifest holds too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from tokopt.ir.program import Program
from tokopt.runtime.format.generation import Generation
from tokopt.runtime.format.link import Link
from tokopt.runtime.format.schedule import Schedule
from tokopt.runtime.format.state import State

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
class AppliedPass:
    """One line of a bundle's history: the pass's text, how many sites it changed, and its notes."""

    text: str
    matches: int
    semantics: Semantics
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bundle:
    """Named programs that share weights and state, and the list of passes that made them.

    ``schedule`` says which program runs when, ``states`` what is kept between calls, ``links`` which output of one
    program is an input of another. ``tokenizer`` is the text of a ``tokenizer.json``; ``generation`` is there for
    bundles that generate text.
    """

    programs: Mapping[str, Program]
    schedule: Schedule
    states: tuple[State, ...] = ()
    links: tuple[Link, ...] = ()
    history: tuple[AppliedPass, ...] = ()
    tokenizer: str | None = None
    generation: Generation | None = None

    @property
    def main(self) -> Program:
        """The program that does most of the work: the one that decodes, or the last that encodes."""
        return self.programs[self.main_name]

    @property
    def main_name(self) -> str:
        """The name of :attr:`main`."""
        return (self.schedule.entry("decode") or self.schedule.entries[-1]).program

    @property
    def entries(self) -> tuple[str, ...]:
        """The names of the programs that entries of the schedule run, each once."""
        return tuple(dict.fromkeys(entry.program for entry in self.schedule.entries))

    @property
    def encoders(self) -> tuple[str, ...]:
        """The names of the programs that encode."""
        return tuple(dict.fromkeys(entry.program for entry in self.schedule.of_role("encode")))

    @property
    def semantics(self) -> Semantics:
        """The weakest class among the passes that changed something."""
        return weakest([step.semantics for step in self.history if step.matches])

    @property
    def pipeline(self) -> str:
        """The text of the pipeline that made this bundle, for example ``"tome{r=16}"``."""
        return ",".join(step.text for step in self.history)

    def state(self, name: str) -> State:
        """The state of this name."""
        return next(state for state in self.states if state.name == name)

    def with_program(self, name: str, program: Program) -> Bundle:
        """A copy of this bundle in which ``name`` is ``program``."""
        return replace(self, programs={**self.programs, name: program})

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run :attr:`main`: on its inputs, or of a language model on tokens [batch, tokens] after an empty cache.

        Returns its outputs, of a language model the logits [batch, tokens, vocabulary] alone.
        """
        if not self.schedule.generates:
            return self.main(*tensors)
        from tokopt.ir.calls import first_call

        (tokens,) = tensors
        values = self.main(*first_call(self.main, tokens, self.states))
        roles = [spec.role for spec in self.main.outputs]
        return tuple(value for value, role in zip(values, roles, strict=True) if role == "logits")


def fresh(name: str, taken: Iterable[str]) -> str:
    """``name``, with a number behind it where it is taken.

    >>> fresh("compact", ["step", "compact"])
    'compact_2'
    """
    known, made, count = set(taken), name, 1
    while made in known:
        count += 1
        made = f"{name}_{count}"
    return made
