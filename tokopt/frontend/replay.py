"""A captured ``step``, called several times, beside the model that reads every text at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokopt.errors import CaptureError
from tokopt.ir.calls import initial
from tokopt.ir.format import State
from tokopt.ir.program import Program
from tokopt.runtime.numerics import check_output

_LIMIT = 1e-8
"""Largest NMSE of the logits of a text."""

_CALLS = (
    ((1, 1, 1, 1, 1), (0, 0, 1, 1, 1)),
    ((1,), (1,)),
    ((1, 1, 1), (1, 1, 0)),
    ((1,), (1,)),
)
"""Which new tokens of two rows are real in each call; the others are padding, before a text and within the cache."""


_SLOTS = 41
"""More than the calls need: a model that takes the end of the cache for the last token is found out."""


@dataclass(frozen=True)
class Reading:
    """A text [tokens] int64 and the ``logits`` [tokens, vocabulary] of a model that reads it alone and at once."""

    text: Tensor
    logits: Tensor


def readings(read: Callable[[Tensor], Tensor], vocabulary: int) -> list[Reading]:
    """Random texts, one per row of the calls; ``read`` takes tokens [1, tokens] and returns their logits."""
    generator = torch.Generator().manual_seed(1)
    texts = (
        torch.randint(vocabulary, (sum(map(sum, row)),), generator=generator)
        for row in zip(*_CALLS, strict=True)
    )
    with torch.no_grad():
        return [Reading(text, read(text[None])[0]) for text in texts]


def reproduces(reading: Reading, got: Tensor) -> bool:
    """Whether the logits [tokens, vocabulary] are those of a reading."""
    return check_output("logits", reading.logits.float().numpy(), got.float().numpy(), _LIMIT).ok


def check_replay(name: str, program: Program, states: Sequence[State], wanted: Sequence[Reading]) -> None:
    """Whether ``step`` gives, call by call, what the model ``name`` gave. Raises CaptureError."""
    given = _replayed(program, states, [reading.text for reading in wanted])
    for row, (reading, got) in enumerate(zip(wanted, given, strict=True)):
        check = check_output("logits", reading.logits.float().numpy(), got.float().numpy(), _LIMIT)
        if not check.ok:
            where = "a text after padding" if row else "a text read in several calls"
            raise CaptureError(
                f"the captured step of {name} does not reproduce the model's logits of {where} (NMSE "
                f"{check.nmse:.2g}); it does not follow the step's positions and boolean mask"
            )


def _replayed(program: Program, states: Sequence[State], texts: Sequence[Tensor]) -> list[Tensor]:
    """The logits [tokens, vocabulary] of every text, read call by call."""
    held = [initial(state, len(texts), _SLOTS) for state in states]
    done, logits = torch.zeros(len(texts), 1, dtype=torch.int64), [list[Tensor]() for _ in texts]
    for call in _CALLS:
        real = torch.tensor(call, dtype=torch.bool)
        count = real.shape[1]
        positions = (done + real.cumsum(1) - 1).masked_fill(~real, -1)
        tokens = torch.stack([text[p.clamp(min=0)] for text, p in zip(texts, positions, strict=True)])
        causal = torch.ones(count, count, dtype=torch.bool).tril().repeat(len(texts), 1, 1)
        out, *held = program(tokens, positions, causal, torch.arange(count), *held)
        for row, known in enumerate(real):
            logits[row].append(out[row, known])
        done = done + real.sum(1, keepdim=True)
    return [torch.cat(parts) for parts in logits]
