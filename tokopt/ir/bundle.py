"""A Bundle: named programs, the state they share, and what drives them.

Names carry no meaning. What a program is for says the schedule, what goes in and comes out say the roles of its
signature, and what a state holds says its kind; they are the data that the artifact's manifest holds too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from tokopt.arguments import check_kind, described
from tokopt.errors import InputError
from tokopt.ir.program import Program, TensorSpec
from tokopt.runtime.format.generation import Generation
from tokopt.runtime.format.link import Link
from tokopt.runtime.format.schedule import Schedule
from tokopt.runtime.format.signature import BATCH, find_role, with_role
from tokopt.runtime.format.state import State

if TYPE_CHECKING:
    import torch

    from tokopt.ir.calls import Calls
    from tokopt.ir.staged import Staged

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
        """The program that does most of the work: the (first) one that decodes, or the last that encodes."""
        return self.programs[self.main_name]

    @property
    def main_name(self) -> str:
        """The name of :attr:`main`."""
        return (self.schedule.entry("decode") or self.schedule.entries[-1]).program

    @property
    def entries(self) -> tuple[str, ...]:
        """The names of the programs that entries of the schedule run, each once."""
        return self.schedule.programs

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
        """The state of this name; raises InputError when there is none."""
        found = next((state for state in self.states if state.name == name), None)
        if found is None:
            names = ", ".join(state.name for state in self.states) or "none"
            raise InputError(f"there is no state {described(name)}; the bundle has {names}")
        return found

    def with_program(self, name: str, program: Program) -> Bundle:
        """A copy of this bundle in which ``name`` is ``program``."""
        return replace(self, programs={**self.programs, name: program})

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """What a caller gives, by name: tokens of a model that generates, then the inputs of programs that encode."""
        found = with_role(self.main.inputs, "tokens") if self.schedule.generates else ()
        encoded = (spec for name in self.encoders for spec in with_role(self.programs[name].inputs, "input"))
        return {spec.name: spec for spec in (*found, *encoded)}

    @property
    def example(self) -> Mapping[str, torch.Tensor]:
        """Tensors that fit :attr:`inputs`: the programs' own examples, with as many rows as the smallest has."""
        known = {
            spec.name: tensor
            for name in (*self.encoders, self.main_name)
            for spec, tensor in zip(self.programs[name].inputs, self.programs[name].example, strict=True)
        }
        rows = [
            known[name].shape[spec.axes.index(BATCH)]
            for name, spec in self.inputs.items()
            if BATCH in spec.axes
        ]
        return {
            name: known[name].narrow(spec.axes.index(BATCH), 0, min(rows))
            if BATCH in spec.axes
            else known[name]
            for name, spec in self.inputs.items()
        }

    def calls(self, given: Mapping[str, torch.Tensor]) -> Calls:
        """The programs of the schedule's entries on tensors that fit :attr:`inputs`."""
        from tokopt.ir.calls import Calls

        programs = {name: self.programs[name] for name in self.entries}
        spec = find_role(self.inputs.values(), "tokens")
        tokens = None if spec is None else self._tokens(given[spec.name])
        return Calls(programs, self.links, self.states, given, tokens)

    def _tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [batch, tokens]; raises InputError for anything else."""
        vocabulary = 0 if self.generation is None else self.generation.vocabulary
        whole = not (tokens.is_floating_point() or tokens.is_complex())
        ids = whole and tokens.ndim == 2 and tokens.numel()
        if not ids or not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise InputError(
                f"tokens of shape {list(tokens.shape)} are no text; give ids [batch, tokens] below {vocabulary}"
            )
        return tokens

    def outputs(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What a caller gets, by name: logits [batch, tokens, vocabulary] after empty caches, or encoders' outputs."""
        calls = self.calls(given)
        if self.schedule.generates:
            decode = self.schedule.entry("decode")
            assert decode is not None
            return calls.outputs(decode.emitter, "logits")
        if self.exits:
            return dict(self.staged(given).outputs)
        return {key: value for name in self.encoders for key, value in calls.outputs(name, "output").items()}

    @property
    def exits(self) -> tuple[str, ...]:
        """The names of the programs after which rows may leave."""
        return tuple(
            name for name in self.encoders if find_role(self.programs[name].outputs, "done") is not None
        )

    def staged(self, given: Mapping[str, torch.Tensor], depth: int | None = None) -> Staged:
        """The outputs of an encoder of several stages, and where each row left.

        Rows leave where their program says that they are done; with a ``depth`` all leave after the entry of it.
        """
        from tokopt.ir.staged import run_stages

        entries = tuple(self.schedule.of_role("encode"))
        return run_stages(entries, self.programs, self.links, given, depth)

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The :meth:`outputs` for tensors in the order of :attr:`inputs`; raises InputError for what does not fit."""
        from tokopt.ir.calls import check_tensors

        given = check_tensors(tensors, tuple(self.inputs.values()))
        return tuple(self.outputs(dict(zip(self.inputs, given, strict=True))).values())


def check_bundle(name: str, value: object) -> Bundle:
    """An argument that must be a bundle; raises InputError."""
    return check_kind(name, value, Bundle, "a Bundle, as tokopt.capture and tokopt.optimize return it")


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
