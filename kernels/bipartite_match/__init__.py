"""tokopt::bipartite_match."""

from typing import Any

from tokopt.kernels.declaration import Choice, Op, Shape, Work, pairs


def work(metric: Shape, *_: Any) -> Work:
    """Similarities of all pairs of one half with the other."""
    return pairs(metric, (metric[1] // 2) ** 2, 4, 40)


OP = Op(choice=Choice(prefix=3), real_form="bipartite_match_real", work=work)
