"""tokopt::keep_slots."""

from tokopt.kernels.declaration import Choice, Op

OP = Op(choice=Choice())
