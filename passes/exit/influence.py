"""How much every block changes the residual stream, over a user's own data (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from tokopt.analysis.blocks import Block
from tokopt.analysis.calibration import Site, observe
from tokopt.analysis.samples import Sample
from tokopt.ir.graph import HIDDEN, ancestors


@dataclass
class _Influence:
    """The sum over tokens of the cosine of a block's input and output; padding does not count."""

    total: float = 0.0
    tokens: float = 0.0
    stream: Tensor | None = field(default=None, repr=False)
    real: Tensor | None = field(default=None, repr=False)

    def enter(self, stream: Tensor) -> None:
        self.stream = stream

    def leave(self, end: Tensor) -> None:
        assert self.stream is not None, "a block's stream is computed before its end"
        cosines = torch.cosine_similarity(self.stream.double(), end.double(), dim=-1)
        real = torch.ones_like(cosines) if self.real is None else self.real.double()
        weight = real.expand_as(cosines)
        self.total += float((cosines * weight).sum())
        self.tokens += float(weight.sum())
        self.stream = None

    @property
    def value(self) -> float:
        """1 less the mean cosine: 0 for a block that only scales its input."""
        return 1 - self.total / self.tokens


def influences(site: Site, blocks: Sequence[Block], samples: Iterable[Sample]) -> list[float]:
    """1 less the mean over tokens of the cosine of every block's input and output."""
    found = [_Influence() for _ in blocks]
    watched = Watched()
    for block, one in zip(blocks, found, strict=True):
        mask = padding_mask(block)
        if mask is not None:
            watched.add(mask, _noting(block, one))
        watched.add(block.stream, one.enter)
        watched.add(block.end, one.leave)
    observe(site, watched.observers, samples)
    return [one.value for one in found]


def _noting(block: Block, influence: _Influence) -> Callable[[Tensor], None]:
    def note(mask: Tensor) -> None:
        real = real_tokens(mask)
        influence.real = real.T if block.token_axis == 0 else real

    return note


def padding_mask(block: Block) -> Node | None:
    """The mask that hides padding from an encoder's block: what depends on an input; None where there is none."""
    mask = block.site.mask
    if mask is None or block.site.cached or block.token_axis is None:
        return None
    return mask if any(node.op == "placeholder" for node in {mask, *ancestors(mask)}) else None


def real_tokens(mask: Tensor) -> Tensor:
    """[batch or 1, tokens] bool: the keys that any query of any head sees, of a mask [batch or 1, ..., keys]."""
    seen = mask if mask.dtype == torch.bool else mask > HIDDEN
    return seen.flatten(1, -2).any(1)


class Watched:
    """Several observers of one node."""

    def __init__(self) -> None:
        self._all: dict[Node, list[Callable[[Tensor], None]]] = {}

    def add(self, node: Node, observer: Callable[[Tensor], None]) -> None:
        """Show the node's values to one more observer, after those before it."""
        self._all.setdefault(node, []).append(observer)

    @property
    def observers(self) -> Mapping[Node, Callable[[Tensor], None]]:
        """One per node."""
        return {node: _calling(observers) for node, observers in self._all.items()}


def _calling(observers: Sequence[Callable[[Tensor], None]]) -> Callable[[Tensor], None]:
    def call(value: Tensor) -> None:
        for observer in observers:
            observer(value)

    return call
