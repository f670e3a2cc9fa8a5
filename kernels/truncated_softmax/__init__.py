"""tokopt::truncated_softmax."""

import math

from tokopt.kernels.declaration import Op, Shape, Work


def _work(logits: Shape, *_: object) -> Work:
    """Every bisection reads a row as often as a threshold has bits."""
    return Work(130.0 * math.prod(logits), 8.0 * math.prod(logits))


OP = Op(work=_work)
