"""tokopt::cache_mask."""

from tokopt.kernels.declaration import Op

OP = Op()
