"""tokopt::source_map."""

from tokopt.kernels.declaration import Op

OP = Op()
