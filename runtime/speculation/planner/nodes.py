"""How many nodes to verify: what a call costs by its rows against what it commits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tokopt.arguments import check_number
from tokopt.errors import InputError
from tokopt.runtime.speculation.decisions import Floats
from tokopt.runtime.speculation.planner.sequoia import Sequoia
from tokopt.runtime.speculation.tree import Tree


@dataclass(frozen=True, eq=False)
class Plan:
    """The tree to verify, the tokens that a call is expected to commit, and the speed against not speculating."""

    tree: Tree
    tokens: float
    speed: float


def plan_nodes(seconds: Mapping[int, float], shares: Floats, drafting: float = 0.0) -> Plan:
    """The tree with the most tokens per second; the root alone where none is faster than that.

    ``seconds`` are a call's by its number of new tokens (:attr:`tokopt.runtime.rows.RowCosts.seconds`), 1 among them;
    between measured numbers they are interpolated, beyond the largest nothing is planned. ``shares`` [depth, rank] is
    the acceptance, ``drafting`` the seconds that proposing and observing take when there is a draft.
    """
    counts = sorted(seconds)
    if not counts or counts[0] != 1:
        raise InputError(
            "seconds must name the time of a call with 1 new token, against which others are held"
        )
    times = [check_number(f"seconds[{n}]", seconds[n], lambda x: x > 0, "above 0") for n in counts]
    drafting = check_number("drafting", drafting, lambda x: x >= 0, "of at least 0")
    nodes = np.arange(1, counts[-1] + 1)
    planned = Sequoia(shares, counts[-1])
    cost = np.interp(nodes, counts, times) + np.where(nodes > 1, drafting, 0)
    speed = planned.expected[1:] * times[0] / cost
    best = int(speed.argmax())  # the first of equals: the fewest nodes
    return Plan(planned.tree(best + 1), float(planned.expected[best + 1]), float(speed[best]))
