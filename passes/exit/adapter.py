"""An adapter between two blocks, with weights from a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from tokopt.analysis.blocks import blocks_of
from tokopt.errors import PassError
from tokopt.ir.bundle import Bundle
from tokopt.passes.exit.drop_blocks import one_program
from tokopt.passes.exit.files import Tensors
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal
from tokopt.rewrite.edit import after, call, close_graph, open_graph, put_parameter, redirect


@dataclass(frozen=True)
class Adapter(Pass):
    """Put an adapter behind ``at`` blocks: the residual stream x becomes x + up(f(down(x))) (arXiv 1902.00751).

    ``file`` is a safetensors file with ``down.weight`` [rank, channels] and ``up.weight`` [channels, rank], and perhaps
    ``down.bias`` [rank] and ``up.bias`` [channels]. f is the ``activation``; ``linear`` leaves a product of low rank.
    All that reads the stream there reads what the adapter makes of it; zeros in ``up`` change nothing.

    Behind as many blocks as there are it stands before the model's end, so that after ``drop_blocks`` of the later
    blocks it makes the early head of a model that drafts for itself.

    Rules. Models of one program.
    """

    at: int
    file: str
    activation: Literal["gelu", "relu", "silu", "linear"] = "gelu"

    name: ClassVar[str] = "adapter"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at < 1:
            raise PassError(f"{self.name}: at={self.at} is behind no block; give 1 or more")

    @property
    def data_free(self) -> bool:
        """It works on every token alike."""
        return True

    def requires(self, bundle: Bundle) -> None:
        """Models in one piece."""
        one_program(self.name, bundle)

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Insert the adapter."""
        name = one_program(self.name, bundle)
        program = bundle.programs[name]
        module = open_graph(program)
        blocks = blocks_of(module.graph)
        if not blocks:
            return PassResult(bundle, 0, (), (Refusal("the model", "it has no block of self-attention"),))
        if self.at > len(blocks):
            raise PassError(f"{self.name}: at={self.at}, but the model has {len(blocks)} blocks")
        stream = blocks[self.at].stream if self.at < len(blocks) else blocks[-1].end
        value = stream.meta["val"]
        weights = self._weights(value.shape[-1], value.dtype)
        readers, following = list(stream.users), stream.next
        operands = [put_parameter(module, following, None, weight) for weight in weights]
        with after(operands[-1]):
            made = call(module.graph, _Adapting(self.activation), stream, *operands, like=stream)
        redirect(readers, stream, made)
        changed = bundle.with_program(name, close_graph(program, module))
        return PassResult(changed, 1, (f"rank {weights[0].shape[0]}, behind {blocks[self.at - 1].label}",))

    def _weights(self, channels: int, dtype: torch.dtype) -> list[Tensor]:
        """Weight and bias of both layers; a bias that the file has not is 0."""
        tensors = Tensors.read(self.name, self.file)
        rank = tensors.rows("down.weight")
        found: list[Tensor] = []
        for layer, out, into in (("down", rank, channels), ("up", channels, rank)):
            found.append(tensors.take(f"{layer}.weight", (out, into)))
            bias = f"{layer}.bias"
            found.append(tensors.take(bias, (out,)) if tensors.has(bias) else torch.zeros(out))
        return [tensor.to(dtype) for tensor in found]


@dataclass(frozen=True)
class _Adapting:
    """What an adapter does, as a function that is traced."""

    activation: str

    def __call__(
        self, stream: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor
    ) -> Tensor:
        inner = functional.linear(stream, down, down_bias)
        if self.activation != "linear":
            inner = getattr(functional, self.activation)(inner)
        return stream + functional.linear(inner, up, up_bias)
