"""tokopt::nearest_kept."""

from typing import Any

from tokopt.kernels.declaration import Choice, Op, Shape, Work, pairs


def work(metric: Shape, keep: Shape, drop: Shape, *_: Any) -> Work:
    """Similarities of all pairs of a dropped and a kept token."""
    return pairs(metric, keep[1] * drop[1], 3, 30)


OP = Op(choice=Choice(), work=work)
