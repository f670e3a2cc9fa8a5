"""Refit linears to what reached them before blocks were removed, in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokopt.analysis.blocks import Block
from tokopt.analysis.calibration import Site, observe
from tokopt.analysis.constants import parameter
from tokopt.analysis.linears import Linear, find_linears
from tokopt.analysis.samples import Sample
from tokopt.ir.graph import ancestors, attention_nodes, reaches
from tokopt.passes.exit.influence import Watched, padding_mask, real_tokens
from tokopt.rewrite.edit import put_parameter


@dataclass
class Products:
    """Sums over rows of what reached a linear with the blocks (``before``) and without them (``now``), in float64."""

    square: Tensor
    mixed: Tensor
    before: Tensor | None = None
    real: Tensor | None = None

    @classmethod
    def of(cls, channels: int) -> Products:
        return cls(*(torch.zeros(channels, channels, dtype=torch.float64) for _ in range(2)))

    def add(self, now: Tensor) -> None:
        """Count the rows of one sample, without those of padding."""
        assert self.before is not None, "the whole model runs first"
        rows, wanted = now.double().flatten(0, -2), self.before.double().flatten(0, -2)
        if self.real is not None and self.real.shape[-1] == now.shape[-2]:
            real = self.real.expand(now.shape[:-1]).flatten()
            rows, wanted = rows[real], wanted[real]
        self.square += rows.T @ rows
        self.mixed += rows.T @ wanted
        self.before = None

    def refitted(self, weight: Tensor, ridge: float) -> Tensor:
        """The weight [out, in] W + W (X - S)^T S (S^T S + lambda I)^-1 of inputs X before and S now.

        ``lambda`` is ``ridge`` times the mean of the diagonal of S^T S.
        """
        size = len(self.square)
        damped = self.square + ridge * self.square.diagonal().mean() * torch.eye(size, dtype=torch.float64)
        change = torch.linalg.lstsq(damped, self.mixed - self.square).solution
        return (weight.double() @ (torch.eye(size, dtype=torch.float64) + change.T)).to(weight.dtype)


def following_linears(module: GraphModule, stream: Node) -> list[Linear]:
    """The linears that read a stream with nothing but norms between: those that removed blocks would have fed."""
    later = reaches(stream)
    linears = find_linears(module.graph)
    products = {linear.node for linear in linears} | set(attention_nodes(module.graph))
    return [
        linear
        for linear in linears
        if linear.input is stream
        or (linear.input in later and products.isdisjoint({linear.input, *ancestors(linear.input)} & later))
    ]


def is_shared(module: GraphModule, linear: Linear) -> bool:
    """Whether the weight is read by something else, too, as a head's that is the table of embeddings."""
    weights = [node for node in {linear.weight, *ancestors(linear.weight)} if node.op == "get_attr"]
    held = {parameter(module, node).data_ptr() for node in weights}
    readers = [
        user
        for node in module.graph.nodes
        if node.op == "get_attr" and parameter(module, node).data_ptr() in held
        for user in node.users
    ]
    return len(readers) > len(weights)


@dataclass(frozen=True)
class Healing:
    """A model before blocks were removed, and as it is now; nodes of both have the same names."""

    before: Site
    now: Site
    ridge: float

    def refit(self, linears: Sequence[Linear], block: Block, samples: Iterable[Sample]) -> None:
        """Let the linears give, of what reaches them now, what they gave before.

        ``block`` of the model before is the one in front of them, whose mask tells padding.
        """
        read = {linear.node.name: linear.input for linear in find_linears(self.before.module.graph)}
        origin = {linear.input: read[linear.node.name] for linear in linears}
        known = {node: Products.of(node.meta["val"].shape[-1]) for node in origin}
        mask = padding_mask(block)
        for sample in samples:
            first, second = Watched(), Watched()
            for node, products in known.items():
                first.add(origin[node], lambda value, one=products: setattr(one, "before", value))
                if mask is not None:
                    first.add(mask, lambda value, one=products: _note(one, value, block))
                second.add(node, products.add)
            observe(self.before, first.observers, [sample])
            observe(self.now, second.observers, [sample])
        for linear in linears:
            weight = known[linear.input].refitted(linear.matrix(self.now.module), self.ridge)
            put_parameter(
                self.now.module, linear.node, linear.place, weight.T if linear.transposed else weight
            )


def _note(products: Products, mask: Tensor, block: Block) -> None:
    real = real_tokens(mask)
    products.real = real.T if block.token_axis == 0 else real
