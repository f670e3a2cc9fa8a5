"""LogitSpec (arXiv 2507.01449): other candidates of the last logits guess the next token, and lookups go on there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokopt.ir.format import BATCH, Generation, State
from tokopt.kernels import ops
from tokopt.passes.speculate.drafters import Verified
from tokopt.passes.speculate.drafters.prompt_lookup import PromptLookup, following
from tokopt.passes.speculate.tree import Tree

WIDTH = 8
"""Candidates that are kept of the place of the last token."""


@dataclass(frozen=True)
class LogitSpec:
    """Branches below the root, each a chain: the text's own lookup, then one per candidate, the likeliest first.

    Candidates are the tokens that were likely in the place of the last one and were not drawn. A candidate's chain goes
    on with what followed the newest place where the text's end, with the candidate behind it, occurred. Where the end
    of the text never occurred, the candidates take its branch as well.

    The rates are what ``python -m benchmarks.drafts logitspec`` measures: a candidate is right at one place of a
    hundred or two, so that trees of few nodes are chains.
    """

    rates: list[float] = field(
        default_factory=lambda: [0.37, 0.02, 0.014, 0.014, 0.01, 0.01, 0.01, 0.007, 0.007]
    )
    below: list[float] | None = field(default_factory=lambda: [0.65])
    fade: float = 1.0
    text: PromptLookup = field(default_factory=PromptLookup)

    def states(self, generation: Generation) -> Sequence[State]:
        """Those of the lookup, and the candidates, -1 where there are none: a table, since some are nearly tied."""
        return (*self.text.states(generation), State("likely", "table", "int32", (BATCH, WIDTH), -1))

    def read(self, tokens: Tensor, positions: Tensor, logits: Tensor, *memory: Tensor) -> Sequence[Tensor]:
        """Write the text, and keep the candidates in the place of its last token."""
        *text, likely = memory
        live = positions[:, -1:] >= 0
        found = candidates(logits[:, 0], tokens[:, -1]).to(likely.dtype)
        return [*self.text.read(tokens, positions, logits, *text), torch.where(live, found, likely)]

    def confidence(self, root: Tensor, *memory: Tensor) -> Tensor:
        """One more than the tokens that agree; 1 where there are only candidates."""
        *text, likely = memory
        agreed = self.text.confidence(root, *text)
        return torch.where(agreed > 0, agreed + 1, (likely[:, 0] >= 0).long())

    def propose(self, root: Tensor, position: Tensor, shape: Tree, *memory: Tensor) -> Tensor:
        """The lookup in the first branch, and in the others the candidates and what follows them."""
        *text, likely = memory
        first = shape.sees & (shape.depth == 1)[None]
        branch = torch.where(first, shape.rank[None], 0).sum(1)
        own = self.text.confidence(root, *text) > 0
        place = (branch[None] - own[:, None].long()).clamp_max(WIDTH - 1)
        guessed = continued(position, shape, place.clamp_min(0), likely, text[0])
        tokens = torch.where(place >= 0, guessed, following(position, shape, *text))
        return torch.where(shape.index == 0, root[:, None], tokens)

    def observe(self, verified: Verified, *memory: Tensor) -> Sequence[Tensor]:
        """The committed tokens are text; the candidates are those beside the last of them."""
        *text, likely = memory
        noted = self.text.observe(verified, *text)
        count = (verified.places >= 0).sum(1)
        root = verified.committed.gather(1, (count - 1).clamp_min(0)[:, None])[:, 0]
        after = ops.gather_tokens(verified.logits, verified.last[:, None], 1)[:, 0]
        found = candidates(after, root).to(likely.dtype)
        return [*noted, torch.where(count[:, None] > 0, found, likely)]


def candidates(logits: Tensor, drawn: Tensor) -> Tensor:
    """The likeliest tokens [batch, 8] by ``logits`` [batch, vocabulary] but those ``drawn`` [batch]; -1 for none."""
    count = min(WIDTH + 1, logits.shape[1])
    found = ops.likeliest(logits[:, None], count)[:, 0]
    other = found != drawn[:, None]
    index = torch.arange(count)
    order = torch.where(other, index, index + count).sort(1).values[:, :WIDTH]
    kept = torch.where(order < count, found.gather(1, order.remainder(count)), -1)
    return torch.nn.functional.pad(kept, (0, WIDTH - min(WIDTH, count)), value=-1)


def continued(position: Tensor, shape: Tree, place: Tensor, likely: Tensor, text: Tensor) -> Tensor:
    """Tokens [batch, nodes] of the chains of the candidates ``place`` [batch, nodes] of ``likely`` [batch, 8].

    -1 where nothing is known. A chain is looked up in ``text`` [batch, context + 1] as if its candidate stood behind
    the root, which is at ``position`` [batch].
    """
    size = text.shape[1]
    end = (position + 1).clamp(0, size - 2)
    longer = text[:, None].expand(-1, WIDTH, -1).flatten(0, 1)
    ends = end[:, None].expand(-1, WIDTH).flatten()
    longer = longer.scatter(1, ends[:, None], likely.flatten()[:, None])
    found, agreed = (x.unflatten(0, (-1, WIDTH)).gather(1, place) for x in ops.latest_repeat(longer, ends))
    candidate = likely.long().gather(1, place)
    period = (end[:, None] - found).clamp_min(1)
    spot = found + 1 + (shape.depth - 2).clamp_min(0).remainder(period)
    after = text.gather(1, spot.clamp(0, size - 1)).long()
    after = torch.where(spot == end[:, None], candidate, after)
    known = (agreed > 0) & (candidate >= 0)
    return torch.where(shape.depth < 2, candidate, torch.where(known, after, -1))


DRAFTER = LogitSpec()
