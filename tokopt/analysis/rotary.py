"""How positions rotate keys and queries (RoPE): read off the graph by running the piece of it that rotates.

Every family spells rotary embeddings in its own way (halves or neighbours, all channels or some, scaled
frequencies), but all are one rotation of channel pairs by an angle proportional to the position. So the few nodes
that rotate are run on probes at chosen positions, the pairs and angles are measured, and the measured rotation has
to reproduce the graph's before it is used.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from tokopt.analysis.cache import CachedAttention, input_of_role
from tokopt.analysis.constants import evaluate
from tokopt.analysis.rotation import Rotary
from tokopt.errors import PassRefused
from tokopt.ir.graph import aten, is_call, operand_at
from tokopt.ir.program import Program

REPRODUCED = 1e-3
"""Largest error, relative to the largest channel, with which the measured rotation may stand for the graph's."""

_SHAPES = tuple(
    getattr(aten, name)
    for name in ("view", "reshape", "transpose", "permute", "unsqueeze", "expand", "slice", "select", "clone")
    + ("split", "split_with_sizes", "chunk", "cat", "stack", "contiguous", "_to_copy", "to", "unflatten")
    + ("flatten", "squeeze", "alias", "unbind")
)
_ARITHMETIC = tuple(getattr(aten, name) for name in ("add", "sub", "mul", "neg"))


def rotaries(program: Program, module: GraphModule, layers: list[CachedAttention]) -> list[Rotary]:
    """The rotation of every layer's keys. Raises PassRefused for a layer whose keys are not rotated."""
    made = []
    for found in find_rotaries(program, module, layers):
        if isinstance(found, PassRefused):
            raise found
        made.append(found)
    return made


def find_rotaries(
    program: Program, module: GraphModule, layers: list[CachedAttention]
) -> list[Rotary | PassRefused]:
    """The rotation of every layer's keys, or why it is none."""
    run = Interpreter(module, garbage_collect_values=False)
    with torch.no_grad():
        run.run(*program.example, enable_io_processing=False)
    positions = input_of_role(program, module, "positions")
    kinds = _kinds(module, positions)
    known: dict[tuple[Any, ...], Rotary] = {}
    made: list[Rotary | PassRefused] = []
    for layer in layers:
        before = _before_rotation(operand_at(layer.keys, 1), kinds)
        if before is None:
            reason = f"the keys of layer {layer.layer} are not rotated by their positions (RoPE)"
            made.append(PassRefused(reason))
            continue
        probe = _Probe(run.env, module, before, operand_at(layer.keys, 1), positions)
        angle = probe(1).flatten()[: probe.channels]  # layers that turn one probe alike share one measurement
        key = (probe.channels, *(round(float(x), 5) for x in angle))
        try:
            if key not in known:
                known[key] = _measure(probe, layer.layer)
            made.append(known[key])
        except PassRefused as reason:
            made.append(reason)
    return made


# --- the piece of the graph that rotates ------------------------------------------------------------------


def _kinds(module: GraphModule, positions: Node) -> dict[Node, str]:
    """What every node comes from: ``"table"`` (positions and constants alone), ``"data"``, or nothing of both."""
    kinds: dict[Node, str] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            kinds[node] = "table" if node is positions else "data"
        elif node.op == "call_function" and isinstance(node.meta.get("val"), Tensor | tuple | list):
            of = {kinds.get(given, "") for given in node.all_input_nodes}
            kinds[node] = "data" if "data" in of else "table" if "table" in of else ""
        else:
            kinds[node] = ""
    return kinds


def _before_rotation(rotated: Node, kinds: Mapping[Node, str]) -> Node | None:
    """The node that the rotation takes: where all ways up from ``rotated`` meet after they met tables."""
    order = {node: place for place, node in enumerate(rotated.graph.nodes)}
    frontier, touched = {rotated}, False
    while not (touched and len(frontier) == 1):
        node = max(frontier, key=order.__getitem__)
        frontier.remove(node)
        if not (is_call(node, *_SHAPES, *_ARITHMETIC, operator.getitem)):
            return None
        touched |= any(kinds[given] == "table" for given in node.all_input_nodes)
        frontier |= {given for given in node.all_input_nodes if kinds[given] == "data"}
        if not frontier:
            return None
    return frontier.pop()


class _Probe:
    """Runs the rotation of one layer on random channels at a chosen position."""

    def __init__(
        self, known: Mapping[Node, Any], module: GraphModule, before: Node, after: Node, positions: Node
    ) -> None:
        self.module, self.before, self.after, self.positions = module, before, after, positions
        self.known = {node: value for node, value in known.items() if not isinstance(value, Tensor)}
        self.like, self.place = known[before], known[positions]
        self.channels = known[after].shape[-1]

    def __call__(self, position: int, seed: int = 0) -> Tensor:
        """What becomes of random channels at one position [batch, heads, tokens, channels] float64."""
        generator = torch.Generator().manual_seed(seed)
        values = {
            **self.known,
            self.before: torch.randn(self.like.shape, generator=generator).to(self.like.dtype),
            self.positions: torch.full_like(self.place, position),
        }
        with torch.no_grad():
            return evaluate(self.module, self.after, values).double()


# --- the measurement --------------------------------------------------------------------------------------


def _measure(probe: _Probe, layer: int) -> Rotary:
    """Pairs from one long way, angles from ways ever longer: each refines the angle that the last one gave."""
    partners = _partners(probe)
    still = _vectors(probe, 0)
    crossed = still[:, partners]
    angles = torch.zeros(probe.channels, dtype=torch.float64)
    for way in (1, 4, 16, 64, 256):
        moved = _vectors(probe, way)
        # Least squares of moved = still * cos + crossed * sin, channel by channel.
        a, b, c = ((x * y).sum(0) for x, y in ((still, still), (still, crossed), (crossed, crossed)))
        u, v = (still * moved).sum(0), (crossed * moved).sum(0)
        size = (a * c - b * b).clamp(min=1e-30)
        seen = torch.atan2((a * v - b * u) / size, (c * u - b * v) / size)
        turns = ((angles * way - seen) / (2 * torch.pi)).round()
        angles = (seen + 2 * torch.pi * turns) / way
    alone = torch.tensor(partners) == torch.arange(probe.channels)
    found = Rotary(tuple(partners), tuple(angles.masked_fill(alone, 0.0).tolist()))
    for start, way in ((0, 7), (3, 200), (200, -57)):
        wanted = probe(start + way, seed=9)
        got = found.rotate(probe(start, seed=9), torch.tensor([way]))
        if (got - wanted).abs().max() > REPRODUCED * wanted.abs().max():
            raise PassRefused(
                f"the keys of layer {layer} depend on positions otherwise than by rotation (RoPE)"
            )
    return found


def _vectors(probe: _Probe, position: int) -> Tensor:
    """Many rotated vectors [vectors, channels], the same ones at every position."""
    made: list[Tensor] = []
    while sum(map(len, made)) < 4 * probe.channels:
        made.append(probe(position, seed=len(made)).flatten(0, -2))
    return torch.cat(made)


def _partners(probe: _Probe) -> list[int]:
    """The channel that each channel is mixed with, itself where it is not rotated."""
    still, moved = _vectors(probe, 0), torch.cat([_vectors(probe, way) for way in (1, 16, 256)], dim=1)
    mixed = torch.linalg.lstsq(still, moved).solution.unflatten(1, (3, -1)).abs().amax(dim=1)
    mixed.fill_diagonal_(0)
    strongest, partner = mixed.max(dim=0)
    return torch.where(strongest > 1e-5, partner, torch.arange(probe.channels)).tolist()
