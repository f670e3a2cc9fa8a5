"""How the kernel of tokopt::merge_tokens is launched."""

from torch import Tensor

from tokopt.kernels.launch import SCALARS, WARPS, Build, ceil


def launch(
    build: Build,
    outputs: tuple[Tensor, ...],
    x: Tensor,
    size: Tensor,
    keep: Tensor,
    drop: Tensor,
    dest: Tensor,
) -> None:
    """A warp per kept token."""
    batch, tokens, channels = x.shape
    kept, r = keep.shape[1], drop.shape[1]
    sizes = (tokens, channels, kept, r)
    run = build(SCALARS[x.dtype])
    run("merge", (ceil(kept, WARPS), batch), (x, size, keep, drop, dest), sizes, outputs)
