"""How the kernel of tokopt::top_tokens is launched."""

from torch import Tensor, sym_max

from tokopt.kernels.launch import BLOCK, SCALARS, Build, ceil


def launch(build: Build, outputs: tuple[Tensor, ...], score: Tensor, r: int, prefix: int) -> None:
    """A thread per token."""
    batch, tokens = score.shape
    run = build(SCALARS[score.dtype])
    grid = (ceil(sym_max(tokens - prefix, prefix), BLOCK), batch)
    run("top", grid, (score,), (tokens, r, prefix), outputs)
