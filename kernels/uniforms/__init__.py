"""tokopt::uniforms, and ``tokopt.cpu::Uniforms``."""

from tokopt.kernels.declaration import Op

OP = Op()
