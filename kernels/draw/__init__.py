"""tokopt::draw."""

from tokopt.kernels.declaration import Op

OP = Op()
