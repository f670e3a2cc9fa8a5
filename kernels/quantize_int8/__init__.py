"""tokopt::quantize_int8."""

from tokopt.kernels.declaration import Op

OP = Op(rounds=True)
