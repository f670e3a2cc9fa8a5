"""tokopt::energy_bipartite_match."""

from typing import Any

from tokopt.kernels.declaration import Choice, Op, Shape, Work, pairs


def work(metric: Shape, *_: Any) -> Work:
    """Similarities of all pairs of tokens, then of one half with the other."""
    return pairs(metric, metric[1] ** 2 + (metric[1] // 2) ** 2, 4, 50)


OP = Op(choice=Choice(prefix=3, by_rank=True), work=work)
