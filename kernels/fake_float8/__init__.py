"""tokopt::fake_float8."""

from tokopt.kernels.declaration import Op

OP = Op(rounds=True, elementwise=True)
