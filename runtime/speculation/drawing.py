"""Drawing the tokens of a tree from the distributions of a drafter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tokopt.runtime.speculation.decisions import Decisions, Floats
from tokopt.runtime.speculation.distribution import read_distribution, without
from tokopt.runtime.speculation.draft import Draft, Drawn
from tokopt.runtime.speculation.tree import Tree

NextToken = Callable[[tuple[int, ...]], Floats]
"""The distribution [vocabulary] of what follows some tokens, the first of which is the root's; zeros for none."""


def read_draft_distribution(node: int, row: Floats) -> Floats | None:
    """What a node's children are drawn from; None where the drafter has nothing to say."""
    return read_distribution(f"q of node {node}", row) if np.any(row) else None


def draw_children(q: Floats, count: int, drawn: Drawn, decisions: Decisions) -> list[int]:
    """At most ``count`` tokens from ``q`` [vocabulary]; fewer where they are distinct and q has no more."""
    possible = count if drawn is Drawn.INDEPENDENT else min(count, int(np.count_nonzero(q)))
    found: list[int] = []
    for place in range(possible):
        likeliest = drawn is Drawn.DETERMINISTIC or (drawn is Drawn.TOP_AND_ONE and place < possible - 1)
        found.append(int(q.argmax()) if likeliest else decisions.draw(q))
        if drawn is not Drawn.INDEPENDENT:
            q = without(q, found[-1])
    return found


def draw_tree(plan: Tree, root: int, next_token: NextToken, drawn: Drawn, decisions: Decisions) -> Draft:
    """Give every node of a planned tree a token, parents first; nodes for which q has no token left are dropped."""
    tokens, rows = [-1] * plan.nodes, dict[int, Floats]()
    tokens[0] = root
    for node, children in enumerate(plan.children):
        if not children or tokens[node] < 0:
            continue
        q = read_draft_distribution(node, next_token(tuple(tokens[i] for i in plan.path(node))))
        if q is None:
            continue
        rows[node] = q
        for child, token in zip(children, draw_children(q, len(children), drawn, decisions), strict=False):
            tokens[child] = token
    tree, kept = plan.keep(np.array(tokens) >= 0)
    old = kept.tolist()
    q = {new: rows[node] for new, node in enumerate(old) if node in rows}
    return Draft(tree, np.array(tokens)[kept], drawn, None if drawn is Drawn.DETERMINISTIC else q)
