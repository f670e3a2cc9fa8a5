"""tokopt::likeliest."""

from tokopt.kernels.declaration import Op

OP = Op()
