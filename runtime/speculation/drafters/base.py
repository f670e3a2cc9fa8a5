"""The protocol of drafters: propose a tree, observe what was verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from tokopt.arguments import check_items
from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Decisions
from tokopt.runtime.speculation.draft import Draft, Drawn, Rows
from tokopt.runtime.speculation.rules.base import Accepted
from tokopt.runtime.speculation.tree import Branches, Tree


@dataclass(frozen=True, eq=False)
class Verified:
    """One row's part of a call: the draft that was verified, what was committed of it, and the likeliest ids [nodes,
    :attr:`Drafter.tops`] after each node, the likeliest first; None where the drafter asks for none.

    The prompt's call counts too: its draft is the last token of the prompt alone.
    """

    draft: Draft
    accepted: Accepted
    top: Rows | None = None

    def top_of(self, node: int, most: int) -> list[int]:
        """Up to ``most`` likeliest ids after a node."""
        if self.top is None:
            raise InputError(
                "this drafter reads the likeliest ids after each node; give them as top [nodes, tops]"
            )
        return np.asarray(self.top[node])[:most].tolist()


class TextDrafter(Protocol):
    """The drafter of one text: one row of one request."""

    def propose(self, plan: Tree, decisions: Decisions) -> Draft:
        """Tokens to verify after the text, whose last token is the root.

        Never more nodes than ``plan``; drafters that have no shape of their own fill the plan's. ``decisions`` is for
        drafters that draw; the others leave it alone.
        """
        ...

    def observe(self, verified: Verified) -> None:
        """Take note of what was verified; the committed tokens are appended to the text."""
        ...


@runtime_checkable
class Drafter(Protocol):
    """A method of drafting and what its texts share."""

    @property
    def name(self) -> str:
        """The method's name."""
        ...

    @property
    def drawn(self) -> Drawn:
        """How the children of a node are chosen."""
        ...

    @property
    def fills(self) -> bool:
        """Whether it gives a planned tree's nodes tokens, and does not build trees of its own."""
        ...

    @property
    def tops(self) -> int:
        """How many likeliest ids after each node it observes."""
        ...

    def open(self, prompt: Sequence[int]) -> TextDrafter:
        """Start with a text [tokens], of at least one token."""
        ...


def read_prompt(prompt: Sequence[int]) -> list[int]:
    """The ids of a prompt as a list of its own."""
    ids = np.asarray(check_items("prompt", prompt, "token ids"))
    if not ids.size:
        raise InputError("prompt is empty, a drafter starts with at least one token")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0:
        raise InputError(
            f"prompt has shape {ids.shape} and dtype {ids.dtype}, it must be token ids of at least 0"
        )
    return ids.tolist()


def fixed(branches: Branches) -> Draft:
    """The draft of a tree that was built without chance."""
    return Draft(branches.tree, np.array(branches.tokens), Drawn.DETERMINISTIC)
