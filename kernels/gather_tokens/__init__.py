"""tokopt::gather_tokens."""

from tokopt.kernels.declaration import Op, Takes

OP = Op(takes=Takes(keep=1, axis=2), positive=((0, 0),))
