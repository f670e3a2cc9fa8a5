"""tokopt::quantize_keys."""

from tokopt.kernels.declaration import Op

OP = Op(unsigned_bytes=True)
