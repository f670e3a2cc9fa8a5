"""tokopt::farthest_point."""

from typing import Any

from tokopt.kernels.declaration import Choice, Op, Shape, Work


def work(metric: Shape, size: Shape, r: int, *_: Any) -> Work:
    """A loop: every chosen token costs a pass over all of them."""
    batch, tokens, channels = metric
    steps = tokens - r
    compared = batch * steps * tokens * channels
    return Work(2 * compared, 4.0 * compared, 10 * steps)


OP = Op(choice=Choice(prefix=3), work=work)
