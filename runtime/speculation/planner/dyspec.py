"""DySpec: a tree that grows where the drafter is sure (arXiv 2410.11744)."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from tokopt.arguments import check_integer, check_number
from tokopt.runtime.speculation.decisions import Decisions, Floats
from tokopt.runtime.speculation.distribution import without
from tokopt.runtime.speculation.draft import Draft, Drawn
from tokopt.runtime.speculation.drawing import NextToken, read_draft_distribution
from tokopt.runtime.speculation.tree import Branches


@dataclass(frozen=True, order=True)
class Slot:
    """A place where one more child can be drawn; slots are ordered by falling value, the older first among equals.

    ``value`` estimates the probability that verification comes to this place: p is taken to be q.
    """

    key: float
    age: int
    parent: int = field(compare=False)
    prefix: tuple[int, ...] = field(compare=False)
    rest: Floats = field(compare=False)
    """What q has left for this child [vocabulary]."""

    @property
    def value(self) -> float:
        """The estimated probability."""
        return -self.key


def grow_tree(
    root: int, next_token: NextToken, nodes: int, decisions: Decisions, least: float = 0.0
) -> Draft:
    """Draw a tree of at most ``nodes`` nodes, each where a child has the highest value, down to the value ``least``.

    A slot of value v from which x is drawn opens two: below x with value v q(x), and for x's next sibling with value
    v (1 - q(x)). Values fall along the way, so that no tree that grows slot by slot has a larger sum of them.
    """
    nodes = check_integer("nodes", nodes, 1)
    least = check_number("least", least, lambda x: 0 <= x <= 1, "from 0 to 1")
    branches, rows, slots = Branches(root), dict[int, Floats](), list[Slot]()
    ages = count()

    def offer(value: float, parent: int, prefix: tuple[int, ...], rest: Floats) -> None:
        heapq.heappush(slots, Slot(-value, next(ages), parent, prefix, rest))

    def expand(value: float, node: int, prefix: tuple[int, ...]) -> None:
        q = read_draft_distribution(node, next_token(prefix))
        if q is not None:
            rows[node] = q
            offer(value, node, prefix, q)

    expand(1.0, 0, (root,))
    while slots and len(branches) < nodes and slots[0].value >= least:
        slot = heapq.heappop(slots)
        token = decisions.draw(slot.rest)
        share, rest = float(slot.rest[token]), without(slot.rest, token)
        node = branches.add(slot.parent, token)
        if len(branches) < nodes:
            expand(slot.value * share, node, (*slot.prefix, token))
        if rest.any():
            offer(slot.value * (1 - share), slot.parent, slot.prefix, rest)
    return Draft(branches.tree, np.array(branches.tokens), Drawn.WITHOUT_REPLACEMENT, rows)
