"""What goes into a program and comes out of it: names, dtypes, named axes and roles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

Axis = str | int
"""A named axis, or the size of a static one."""

BATCH = "batch"
"""The axis that counts rows; every other name is free."""

DTYPES = frozenset(
    ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    + ("float16", "bfloat16", "float32", "float64")
)

DRAWING = {
    "temperature": ("float32", 0.0),
    "top_k": ("int64", 0),
    "top_p": ("float32", 1.0),
    "min_p": ("float32", 0.0),
    "seed": ("int64", 0),
    "stream": ("int64", 0),
}
"""Roles of the inputs [batch] that tell a program how to draw tokens -> dtype, and what a greedy choice takes."""

INPUT_ROLES = (
    "input",
    "tokens",
    "positions",
    "mask",
    "rows",
    "limit",
    "due",
    "parent",
    "path",
    "count",
    *DRAWING,
    "link",
    "state",
)
OUTPUT_ROLES = (
    "output",
    "logits",
    "tokens",
    "count",
    "logprobs",
    "confidence",
    "neighbours",
    "done",
    "depth",
    "link",
    "written",
    "state",
)

SEVERAL = frozenset(("input", "output", "link", "written", "state"))
"""Roles that more than one input or output of a program may have."""


@dataclass(frozen=True)
class Tensor:
    """Name, numpy dtype, axes and role of one input or output.

    An axis is an int (static) or a string (named). Those of inputs are names with a range; those of outputs
    may also be expressions of names, such as ``"tokens - 16"``.

    ``state`` names the State that an input reads, or whose next value an output is; the role is then ``"state"``.
    The other roles of inputs are ``"input"`` (an array of the caller), ``"tokens"`` [batch, n] and ``"positions"``
    [batch, n] (int64; the position of padding is -1), ``"mask"`` [batch, n, n] (which new token sees which), ``"rows"``
    [k] (the tokens whose logits are wanted), ``"limit"`` [batch] (the most tokens that a row may commit in this call),
    ``"due"`` [batch] (the rows that a triggered program acts on), ``"parent"`` [n] (of every proposed token, the one
    before it; -1 for the first, which was committed), ``"path"`` [batch, n] with ``"count"`` [batch] (which of the
    tokens that the last call read are kept, in their order), those of :data:`DRAWING` [batch] (how tokens are drawn;
    ``"stream"`` says which of the seed's streams of random numbers is the row's) and ``"link"`` (another program's
    output). Those of outputs are ``"output"`` (an array for the caller), ``"logits"`` [batch, rows, vocabulary],
    ``"tokens"`` [batch, n] with ``"count"`` [batch] (the first so many tokens of a row were committed) and perhaps
    ``"logprobs"`` [batch, n] (logarithms of the probabilities that the model gave them) and ``"confidence"`` [batch] (0
    where the next call has nothing to propose, larger numbers where what it has is likelier right), ``"neighbours"``
    [batch, n, k] (the tokens nearest to each new one, the nearest first), ``"done"`` [batch]
    (the rows that leave after this program), ``"depth"`` [batch] (after how many blocks a row left), ``"link"``, and
    ``"written"`` (a buffer of a state between two writes into it, which a host may bind to that buffer and need not
    read).
    """

    name: str
    dtype: str
    axes: tuple[Axis, ...]
    role: str = "input"
    state: str | None = None

    def __str__(self) -> str:
        """``images: float32[batch, 3, 224, 224]``."""
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.axes))}]"


@dataclass(frozen=True)
class Range:
    """The sizes that a named axis may take, both ends included; ``max`` is None when unbounded."""

    min: int = 1
    max: int | None = None


class TensorLike(Protocol):
    """What the format asks of the description of an input or output."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def axes(self) -> tuple[Axis, ...]: ...
    @property
    def role(self) -> str: ...
    @property
    def state(self) -> str | None: ...


class RangeLike(Protocol):
    """What the format asks of the sizes of an axis."""

    @property
    def min(self) -> int: ...
    @property
    def max(self) -> int | None: ...


class Signature(Protocol):
    """What the format asks of a program, whatever else it holds.

    ``ranges`` gives the sizes of every named axis of the inputs. ``aliases`` maps outputs to inputs: the output is that
    input with entries written into it, so that one buffer must serve as both. Several outputs may alias one input.
    """

    @property
    def inputs(self) -> Sequence[TensorLike]: ...
    @property
    def outputs(self) -> Sequence[TensorLike]: ...
    @property
    def ranges(self) -> Mapping[str, RangeLike]: ...
    @property
    def aliases(self) -> Mapping[str, str]: ...


Described = TypeVar("Described", bound=TensorLike)


def with_role(tensors: Iterable[Described], role: str) -> tuple[Described, ...]:
    """The inputs or outputs of a role, in their order."""
    return tuple(tensor for tensor in tensors if tensor.role == role)


def find_role(tensors: Iterable[Described], role: str) -> Described | None:
    """The input or output of a role that a program has at most once."""
    return next((tensor for tensor in tensors if tensor.role == role), None)


def wiring(tensors: Iterable[TensorLike]) -> dict[str, str]:
    """The state that each of the inputs or outputs of role ``"state"`` is of, by the tensor's name."""
    return {tensor.name: tensor.state for tensor in tensors if tensor.state is not None}
