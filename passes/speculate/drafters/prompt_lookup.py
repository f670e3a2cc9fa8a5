"""Prompt lookup (n-gram) decoding: what followed the same words earlier in the text may follow them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokopt.ir.format import BATCH, Generation, State
from tokopt.kernels import ops
from tokopt.passes.speculate.drafters import Verified
from tokopt.passes.speculate.tree import Tree


@dataclass(frozen=True)
class PromptLookup:
    """The text so far by position, and where its end occurred before: the longest and newest such place.

    Of the last three tokens, two or one, as many as possible have to be the same. A node of rank 0 at depth d gets the
    d-th token after that place, and behind the text's end what came after the place once more, and so on.
    """

    rates: list[float] = field(default_factory=lambda: [0.7])
    below: list[float] | None = None
    fade: float = 1.0

    def states(self, generation: Generation) -> Sequence[State]:
        """The token at every position, -1 where there is none yet, and one place more that takes what is no token.

        And where the end occurred before, with the number of tokens that agree there: -1 and 0 for nowhere.
        """
        return (
            State("text", "history", "int32", (BATCH, generation.context + 1), -1),
            State("repeat", "history", "int64", (BATCH, 2)),
        )

    def read(self, tokens: Tensor, positions: Tensor, logits: Tensor, *memory: Tensor) -> Sequence[Tensor]:
        """Write the text, and look for its end."""
        text = written(memory[0], tokens, positions)
        return [text, torch.stack(ops.latest_repeat(text, positions.amax(1).clamp_max(text.shape[1] - 2)), 1)]

    def confidence(self, root: Tensor, *memory: Tensor) -> Tensor:
        """The tokens that agree."""
        return memory[1][:, 1]

    def propose(self, root: Tensor, position: Tensor, shape: Tree, *memory: Tensor) -> Tensor:
        """The tokens after the place, if there is one."""
        agreed = self.confidence(root, *memory) > 0
        copied = torch.where(agreed[:, None], following(position, shape, *memory), -1)
        return torch.where(shape.index == 0, root[:, None], copied)

    def observe(self, verified: Verified, *memory: Tensor) -> Sequence[Tensor]:
        """As when reading what was committed."""
        return self.read(verified.committed, verified.places, verified.logits, *memory)


def written(text: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
    """The text [batch, context + 1] with tokens [batch, n] at their positions; those of -1 go to the last place.

    What lies beyond the context goes there, too; that place is never read as text.
    """
    last = text.shape[1] - 1
    index = torch.where((places >= 0) & (places < last), places, last)
    value = torch.where(index < last, tokens, -1).to(text.dtype)
    return text.scatter(1, index, value)


def following(position: Tensor, shape: Tree, text: Tensor, repeat: Tensor) -> Tensor:
    """Tokens [batch, nodes] for the depths of a tree below the root at ``position`` [batch]; -1 for none."""
    place = repeat[:, :1]
    period = (position[:, None] - place).clamp_min(1)
    spot = place + 1 + (shape.depth - 1).clamp_min(0).remainder(period)
    return text.gather(1, spot.clamp_max(text.shape[1] - 1)).long()


DRAFTER = PromptLookup()
