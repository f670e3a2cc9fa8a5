"""How the kernel of tokopt::gather_tokens is launched."""

from math import gcd, prod

from torch import Tensor

from tokopt.kernels.launch import WARPS, Build, ceil

WIDEST = 16
"""Bytes that are copied at a time, at most."""


def launch(build: Build, outputs: Tensor, x: Tensor, index: Tensor, dim: int) -> None:
    """A warp per row of what lies behind the token axis, in the widest words that divide it."""
    outer, tokens, row = prod(x.shape[1:dim]), x.shape[dim], prod(x.shape[dim + 1 :]) * x.element_size()
    batch, kept = index.shape
    width = gcd(WIDEST, row, x.data_ptr(), outputs.data_ptr())
    rows = outer if x.shape[0] == batch else 0
    sizes = (rows, outer, tokens, kept, row // width, width)
    build("float")("gather", (ceil(outer * kept, WARPS), batch), x, index, outputs, *sizes)
