"""Where proposed tokens come from, one drafter per file; each needs no model and runs inside the program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from torch import Tensor

from tokopt.ir.format import BATCH, Generation, State
from tokopt.passes.speculate.tree import Tree


@dataclass(frozen=True)
class Verified:
    """A verified tree: its ``tokens`` [batch, nodes] and the ``logits`` [batch, nodes, vocabulary] after each.

    ``committed`` [batch, nodes] are tokens at the positions ``places``, which are -1 behind the last, chosen after the
    node ``last`` [batch].
    """

    tokens: Tensor
    logits: Tensor
    committed: Tensor
    places: Tensor
    last: Tensor


class Drafter(Protocol):
    """What proposes tokens, and remembers what it proposes by. All but ``states`` is plain PyTorch, traced.

    ``memory`` are the values of ``states``, in their order; what returns memory returns the next values.
    """

    rates: list[float]
    """How often its proposal of each rank is right, roughly: what the default tree is grown for."""

    below: list[float] | None
    """The same for what is not a child of the root, where that differs."""

    fade: float
    """By how much less on each further level."""

    def states(self, generation: Generation) -> Sequence[State]:
        """What it remembers between calls."""
        ...

    def read(self, tokens: Tensor, positions: Tensor, logits: Tensor, *memory: Tensor) -> Sequence[Tensor]:
        """Take note of tokens [batch, n] of the text, the newest last; -1 is the position of padding.

        The newest was drawn from ``logits`` [batch, 1, vocabulary]. Nothing is returned of states that do not learn of
        what is read, see :func:`learns_by_reading`.
        """
        ...

    def confidence(self, root: Tensor, *memory: Tensor) -> Tensor:
        """How much is to be hoped of what it would propose below ``root`` [batch], which it has taken note of.

        [batch] int64: 0 where it has nothing to propose, larger numbers where it is surer.
        """
        ...

    def propose(self, root: Tensor, position: Tensor, shape: Tree, *memory: Tensor) -> Tensor:
        """Tokens of all nodes [batch, nodes] int64 below the ``root`` [batch] at ``position`` [batch]; -1 for none."""
        ...

    def observe(self, verified: Verified, *memory: Tensor) -> Sequence[Tensor]:
        """Take note of a verified tree."""
        ...


def learns_by_reading(state: State) -> bool:
    """Whether a drafter's state takes note of what is read; a table that rows share learns of verified trees alone."""
    return state.kind != "table" or BATCH in state.axes


DRAFTERS = ("prompt_lookup", "token_recycling", "hybrid", "logitspec")


def load_drafter(name: str) -> Drafter:
    """The drafter of a name."""
    return import_module(f"{__name__}.{name}").DRAFTER
