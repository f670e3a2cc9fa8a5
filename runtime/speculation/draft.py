"""A draft: a tree with its tokens, and how they were drawn."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np

from tokopt.errors import InputError
from tokopt.runtime.speculation.tree import Ints, Tree


class Drawn(Enum):
    """How the children of a node were chosen, given the tokens up to it; the value completes "drafts ...".

    Nothing of the target's distribution at that node may enter.
    """

    INDEPENDENT = "drawn from q independently of each other, with replacement"
    WITHOUT_REPLACEMENT = "drawn from q one after the other, without replacement"
    DETERMINISTIC = "chosen without chance"
    TOP_AND_ONE = "the likeliest tokens of q in their order and, last, one drawn from the rest of q"


class Rows(Protocol):
    """One row per node: an array [nodes, ...], or what computes a row when it is asked for."""

    def __getitem__(self, node: int, /) -> Any:
        """The row of a node."""
        ...


@dataclass(frozen=True, eq=False)
class Draft:
    """The tokens of a tree's nodes [nodes], how they were drawn, and from which distributions.

    Token 0 is the root's, the last of the text. ``q`` [nodes, vocabulary] is the distribution that a node's children
    were drawn from, and may lack nodes that have none; None where nothing was drawn.
    """

    tree: Tree
    tokens: Ints
    drawn: Drawn
    q: Rows | None = None

    def __post_init__(self) -> None:
        tokens = np.asarray(self.tokens)
        if tokens.shape != (self.tree.nodes,) or tokens.dtype.kind not in "iu" or (tokens < 0).any():
            raise InputError(
                f"tokens have shape {tokens.shape} and dtype {tokens.dtype}, they must be {self.tree.nodes} token ids, "
                "one per node"
            )
        object.__setattr__(self, "tokens", tokens.astype(np.int64))
