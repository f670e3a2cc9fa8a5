"""How the kernels of tokopt::nearest_kept are launched."""

from torch import Tensor

from tokopt.kernels.launch import SCALARS, TILE, WARPS, Build, ceil


def launch(build: Build, outputs: Tensor, metric: Tensor, keep: Tensor, drop: Tensor, prefix: int) -> None:
    """The norms, then the most similar kept token."""
    batch, tokens, channels = metric.shape
    kept, r = keep.shape[1], drop.shape[1]
    run = build(SCALARS[metric.dtype])
    inverse = metric.new_empty((batch, tokens)).float()
    run("inverse_norms", (ceil(tokens, WARPS), batch), (metric,), (tokens, channels), (inverse,))
    sizes = (tokens, channels, kept, r, prefix)
    run("nearest", (ceil(r, TILE), batch), (metric, inverse, keep, drop), sizes, (outputs,))
