"""tokopt::top_tokens."""

from tokopt.kernels.declaration import Choice, Op

OP = Op(choice=Choice(prefix=2))
