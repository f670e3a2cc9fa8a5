"""tokopt::cache_write."""

from tokopt.kernels.declaration import Op

OP = Op()
