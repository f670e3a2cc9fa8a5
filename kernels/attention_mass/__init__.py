"""tokopt::attention_mass."""

from tokopt.kernels.declaration import Op

OP = Op()
