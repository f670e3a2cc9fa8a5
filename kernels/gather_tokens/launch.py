"""How the kernel of tokopt::gather_tokens is launched."""

from math import prod

from torch import Tensor

from tokopt.kernels.launch import WARPS, Build, ceil


def launch(build: Build, outputs: Tensor, x: Tensor, index: Tensor, dim: int) -> None:
    """A warp per row of what lies behind the token axis, in the widest words that divide it."""
    outer, tokens, row = prod(x.shape[1:dim]), x.shape[dim], prod(x.shape[dim + 1 :]) * x.element_size()
    batch, kept = index.shape
    rows = 0 if x.shape[0] == 1 else outer
    sizes = (rows, outer, tokens, kept, row)
    build("float")("gather", (ceil(outer * kept, WARPS), batch), (x, index), sizes, (outputs,))
