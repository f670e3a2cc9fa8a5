"""tokopt::dequantize_weight."""

from tokopt.kernels.declaration import Op

OP = Op(unsigned_bytes=True)
