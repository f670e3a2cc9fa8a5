"""tokopt::fake_quantize."""

from tokopt.kernels.declaration import Op

OP = Op(rounds=True, elementwise=True)
