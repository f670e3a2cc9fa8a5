"""How the kernel of tokopt::dequantize_keys is launched."""

from torch import Tensor

from tokopt.kernels.launch import BLOCK, Build, ceil


def launch(build: Build, outputs: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
    """A thread per channel and group of slots."""
    batch, heads, slots, channels = codes.shape
    group = channels // scale.shape[3]
    grid = (ceil(ceil(slots, group) * channels, BLOCK), batch * heads)
    build("float")("dequantize", grid, (codes, scale, zero), (slots, channels, group), (outputs,))
