"""How the kernel of tokopt::quantize_keys is launched."""

from torch import Tensor

from tokopt.kernels.launch import BLOCK, Build, ceil


def launch(build: Build, outputs: tuple[Tensor, ...], x: Tensor, group: int) -> None:
    """A thread per channel and group of slots."""
    batch, heads, slots, channels = x.shape
    grid = (ceil(ceil(slots, group) * channels, BLOCK), batch * heads)
    build("float")("quantize", grid, (x,), (slots, channels, group), outputs)
