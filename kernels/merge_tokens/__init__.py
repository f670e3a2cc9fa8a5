"""tokopt::merge_tokens."""

from tokopt.kernels.declaration import Op, Shape, Takes, Work, pairs


def work(x: Shape, size: Shape, keep: Shape, drop: Shape, dest: Shape) -> Work:
    """As a matrix of kept by dropped tokens, which is what the portable form builds."""
    return pairs(x, keep[1] * drop[1], 3, 30)


OP = Op(takes=Takes(keep=2), positive=((1, 1),), work=work)
