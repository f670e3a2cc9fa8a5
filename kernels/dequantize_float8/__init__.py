"""tokopt::dequantize_float8."""

from tokopt.kernels.declaration import Op

OP = Op(unsigned_bytes=True)
