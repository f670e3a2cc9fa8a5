"""How the kernel of tokopt::top_tokens is launched."""

from torch import Tensor

from tokopt.kernels.launch import BLOCK, SCALARS, Build, ceil


def launch(build: Build, outputs: tuple[Tensor, ...], score: Tensor, r: int, prefix: int) -> None:
    """A thread per token."""
    batch, tokens = score.shape
    run = build(SCALARS[score.dtype])
    run("top", (ceil(max(tokens - prefix, prefix), BLOCK), batch), score, *outputs, tokens, r, prefix)
