"""What others must know of a token op, beside its forms: every ``kernels/<op>/__init__.py`` declares it as ``OP``.

Needs neither torch nor any other package. The sizes of an op's outputs are said by ``fake`` of its ``reference.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """What one call costs: floating-point operations, bytes moved, and kernels that an engine launches."""

    flops: float
    bytes: float
    launches: int = 1


Shape = tuple[int, ...]


def copying(first: Shape, *_: Any) -> Work:
    """The work of an op that reads and writes its first operand, and computes next to nothing."""
    return Work(0, 8.0 * math.prod(first), 3)


def pairs(first: Shape, count: int, passes: int, launches: int) -> Work:
    """The work of comparing ``count`` pairs of tokens in each row of ``first`` [batch, tokens, channels].

    The matrix of all pairs is moved ``passes`` times, in float32.
    """
    batch, _, channels = first
    return Work(2 * batch * count * channels, 8.0 * math.prod(first) + 4 * passes * batch * count, launches)


@dataclass(frozen=True)
class Choice:
    """How an op chooses tokens.

    With a ``prefix`` (the place of the argument that counts the leading protected tokens) its outputs are the kept
    and the dropped tokens of a stream, and perhaps what each dropped one merges into; the kept ones begin with the
    prefix, in order. Without one it chooses slots of a cache, or destinations alone. ``by_rank`` says that ranks
    alternate between merging and being merged into, so that a near tie exchanges the roles of two tokens.
    """

    prefix: int | None = None
    by_rank: bool = False


@dataclass(frozen=True)
class Takes:
    """The (first) output has the tokens of the first operand that argument ``keep`` lists, other tokens perhaps merged.

    ``axis`` is the place of the argument that says which axis counts tokens; None where that is always axis 1.
    """

    keep: int
    axis: int | None = None


@dataclass(frozen=True)
class Op:
    """What analyses and lowerings must know of a token op.

    ``choice``: it chooses tokens. ``rounds``: it rounds numbers to a grid. ``takes``: it takes the chosen ones out of a
    tensor. ``elementwise``: every number of the result is computed from the one at its place in the first operand
    and from no other, so every axis goes through as it is. ``positive``: (output, operand) such that all numbers of the
    output are positive where those of the operand are. ``unsigned_bytes``: it takes or gives unsigned bytes.
    ``real_form``: the ONNX function that computes the same where no token is padding, that is where operand 1, the
    sizes, is positive. ``work``: the cost of a call, given its arguments with the shape of each tensor in its place.
    """

    choice: Choice | None = None
    rounds: bool = False
    takes: Takes | None = None
    elementwise: bool = False
    positive: tuple[tuple[int, int], ...] = ()
    unsigned_bytes: bool = False
    real_form: str = ""
    work: Callable[..., Work] = copying

    @property
    def unstable(self) -> bool:
        """Whether a rounding error of an operand may change an output by far more, at a near tie."""
        return self.choice is not None or self.rounds
