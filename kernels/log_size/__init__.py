"""tokopt::log_size."""

from tokopt.kernels.declaration import Op

OP = Op()
