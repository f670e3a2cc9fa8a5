"""Accept rules that change what a model writes, inside the program: those of ``runtime/speculation/rules`` by name.

Each says of a verified tree what of it is committed. The distributions after its nodes are those that tokens would be
drawn from without speculation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from tokopt.kernels import ops
from tokopt.passes.speculate.tree import Tree, fitting


class Decided(NamedTuple):
    """The last node [batch] of the path that is kept, the token [batch] behind it, and how many random numbers [batch]
    the decisions took."""

    node: Tensor
    token: Tensor
    used: Tensor


class LossyRule(Protocol):
    """An accept rule of which ``lossy`` says what it changes; ``draws``: a token alone is drawn, as without."""

    draws: ClassVar[bool]

    @property
    def neighbours(self) -> int:
        """How many neighbours of each token it asks for."""
        ...

    @property
    def lossy(self) -> str:
        """What it changes."""
        ...

    def decide(
        self, shape: Tree, tokens: Tensor, near: Tensor, p: Tensor, uniform: Tensor, limit: Tensor
    ) -> Decided:
        """What is kept of the ``tokens`` [batch, nodes], -1 for none, of a tree that has at most ``nodes`` nodes.

        ``near`` [batch, nodes, neighbours] are other tokens near each, the nearest first, ``p`` [batch, nodes,
        vocabulary] the distributions after each, ``uniform`` [batch, nodes] random numbers, of which the first come
        first. Of at most ``limit`` [batch] tokens.
        """
        ...


@dataclass(frozen=True)
class Lantern:
    """:class:`tokopt.runtime.speculation.rules.lantern.Lantern` for trees of at most ``nodes`` nodes.

    Of siblings with one token the first counts, and what stands below the others is never reached.
    """

    nodes: int
    delta: float
    neighbours: int

    draws: ClassVar[bool] = True

    @property
    def lossy(self) -> str:
        """As the host's rule says it."""
        moved = f"it moves up to {self.delta:g} of the probability to drafted tokens from their neighbours"
        return f"the rule 'lantern' is lossy: {moved}"

    def decide(
        self, shape: Tree, tokens: Tensor, near: Tensor, p: Tensor, uniform: Tensor, limit: Tensor
    ) -> Decided:
        """Walk down: nodes in their order, of which those are tried that stand below the last that was accepted."""
        vocabulary, end = p.shape[2], shape.index[-1:]
        twins = (shape.up[:, None] == shape.up[None, :]) & (shape.index[None, :] < shape.index[:, None])
        twins = twins & (shape.index > 0)[None, :]
        copied = (twins[None] & (tokens[:, :, None] == tokens[:, None, :])).any(-1)
        proposed = (tokens >= 0) & ~copied & (shape.depth[None] < limit[:, None])
        node, used = torch.zeros_like(limit), torch.zeros_like(limit)
        left, budget = p[:, 0], torch.full_like(limit, self.delta, dtype=torch.float64)
        for place in range(1, self.nodes):
            child = end.clamp_max(place)  # the last one again in trees of fewer nodes
            token = tokens.index_select(1, child).clamp_min(0)
            possible = p.flatten(1).gather(1, node[:, None] * vocabulary + token)[:, 0] > 0
            live = proposed.index_select(1, child)[:, 0] & possible
            live = live & (shape.up[child] == node) & (end >= place)
            beside = near.index_select(1, child)[:, 0]
            shares, own = left.gather(1, beside).double(), left.gather(1, token)[:, 0].double()
            counted = shares.cumsum(1) <= budget[:, None]
            moved = torch.where(counted, shares, 0.0).sum(1)
            whole = left.double().sum(1)
            decides = live & (whole > 0)
            number = uniform.gather(1, used[:, None])[:, 0].double()
            taken = decides & (number < ((own + moved) / whole).clamp_max(1.0))
            rejected = live & ~taken
            gone = torch.cat([counted, torch.ones_like(token, dtype=torch.bool)], 1) & rejected[:, None]
            places = torch.cat([beside, token], 1)
            left = left.scatter(1, places, torch.where(gone, 0.0, left.gather(1, places)))
            left = torch.where(taken[:, None], p.index_select(1, child)[:, 0], left)
            budget = torch.where(taken, self.delta, torch.where(rejected, budget - moved, budget))
            node, used = torch.where(taken, child, node), used + decides.long()
        # Nothing is left only where a rejection had no probability beyond rounding.
        after = ops.gather_tokens(p, node[:, None], 1)[:, 0]
        rest = torch.where((left.double().sum(1) > 0)[:, None], left, after)
        drawn = ops.draw(rest[:, None], uniform.gather(1, used[:, None]))[:, 0]
        return Decided(node, drawn, used + 1)


@dataclass(frozen=True)
class Typical:
    """:class:`tokopt.runtime.speculation.rules.typical.Typical`."""

    epsilon: float
    alpha: float

    draws: ClassVar[bool] = False

    @property
    def neighbours(self) -> int:
        """It knows of none."""
        return 0

    @property
    def lossy(self) -> str:
        """As the host's rule says it."""
        taken = "it takes every drafted token above a threshold instead of drawing from p"
        return f"the rule 'typical' is lossy: {taken}"

    def decide(
        self, shape: Tree, tokens: Tensor, near: Tensor, p: Tensor, uniform: Tensor, limit: Tensor
    ) -> Decided:
        """The deepest path of tokens above their thresholds; the likeliest of these, and the first of equals."""
        wide = p.double()
        entropy = -(wide * torch.where(wide > 0, wide, 1.0).log()).sum(-1)
        least = (self.alpha * (-entropy).exp()).clamp_max(self.epsilon)
        place = shape.up[None] * p.shape[2] + tokens.clamp_min(0)
        likely = wide.flatten(1).gather(1, place)
        right = (tokens >= 0) & (likely > least[:, shape.up])
        fits = fitting(shape, right, limit)
        logs = torch.where(right & (shape.index > 0), torch.where(right, likely, 1.0).log(), 0.0)
        score = (shape.sees.double()[None] * logs[:, None, :]).sum(-1)
        depth = torch.where(fits, shape.depth[None], -1)
        among = fits & (depth == depth.amax(-1, keepdim=True))
        node = torch.where(among, score, -torch.inf).argmax(-1)
        chosen = ops.gather_tokens(p, node[:, None], 1)[:, 0].argmax(-1)
        return Decided(node, chosen, torch.zeros_like(limit))
