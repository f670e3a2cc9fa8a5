"""tokopt::uniforms."""

from tokopt.kernels.declaration import Op

OP = Op()
