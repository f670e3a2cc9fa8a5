"""Where the step of a language model keeps keys and values, and which attention reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from tokopt.analysis.rotation import Rotary
from tokopt.analysis.written_out import Hiding, Reading, written_out
from tokopt.errors import PassRefused
from tokopt.ir.export import placeholders
from tokopt.ir.format import State
from tokopt.ir.graph import SDPA, argument, describe, is_call, operand_at
from tokopt.ir.program import Program
from tokopt.kernels import ops


@dataclass(frozen=True)
class AttentionTraits:
    """What the attentions of layers that are alike have in common.

    ``window`` in positions, 0 for none; ``scale`` is what query-key products are multiplied by; ``rotary`` is how
    positions rotate the keys, once it was looked for.
    """

    window: int
    scale: float
    rotary: Rotary | None


@dataclass(frozen=True)
class CachedAttention:
    """The attention of a layer over its cache.

    ``layer`` is the layer of the states ``key_state`` and ``value_state``; ``node`` gives what the attention gives;
    ``query`` are the queries [batch, heads, tokens, channels] as it takes them; ``keys`` and ``values`` are the
    ``cache_write`` calls on the states; ``hiding`` has the ``cache_mask`` call that hides slots. ``scale`` is what
    query-key products are multiplied by, NaN where the logits are capped or have sinks beside them. ``rotary`` is how
    positions rotate the keys, once it was looked for.
    """

    layer: int
    node: Node
    query: Node
    keys: Node
    values: Node
    hiding: Hiding
    key_state: str
    value_state: str
    scale: float
    rotary: Rotary | None = None

    @property
    def fused(self) -> bool:
        """Whether it is ``scaled_dot_product_attention``, and not written out."""
        return is_call(self.node, SDPA)

    @property
    def window(self) -> int:
        """Sliding window in positions, 0 for none."""
        window = argument(self.hiding.mask, 4, "window")
        assert isinstance(window, int)
        return window

    @property
    def traits(self) -> AttentionTraits:
        """What it has in common with other layers."""
        return AttentionTraits(self.window, self.scale, self.rotary)


def fused_attentions(program: Program, module: GraphModule, states: Sequence[State]) -> list[CachedAttention]:
    """Those of :func:`cached_attentions`; raises PassRefused where one is written out."""
    found = cached_attentions(program, module, states)
    if others := [layer.layer for layer in found if not layer.fused]:
        raise _read_otherwise(others, "with capped logits or sinks")
    return found


def cached_attentions(
    program: Program, module: GraphModule, states: Sequence[State]
) -> list[CachedAttention]:
    """Every attention of a program that reads a cache, by layer; ``module`` is the program's open graph.

    Raises PassRefused when one does not read a cache of its own directly, or when something else reads a cache.
    """
    known = {state.name: state for state in states}
    held = {node: spec.state for node, spec in zip(placeholders(module), program.inputs, strict=True)}
    found: list[CachedAttention] = []
    for node in module.graph.nodes:
        reading = _fused(node) if is_call(node, SDPA) else written_out(node)
        if reading is None:
            continue
        key_state, value_state = (held.get(operand_at(x, 0)) for x in (reading.keys, reading.values))
        layer = known[key_state].layer if key_state is not None else None
        if key_state is None or layer is None or value_state is None:
            raise _indirect(node)
        scale = _scale(node) if is_call(node, SDPA) else math.nan
        parts = reading.node, reading.query, reading.keys, reading.values, reading.hiding
        found.append(CachedAttention(layer, *parts, key_state, value_state, scale))
    by_layer = {attention.layer: attention for attention in found}
    if len(by_layer) != len(found):
        raise PassRefused("two attentions read the same cache")
    layers = {state.layer for state in states if state.kind == "key" and state.name in held.values()}
    if others := sorted(layer for layer in layers if layer is not None and layer not in by_layer):
        raise _read_otherwise(others, "in a form that is not known")
    return [by_layer[layer] for layer in sorted(by_layer)]


def _fused(node: Node) -> Reading:
    """The operands of a fused attention over a cache; raises PassRefused for one over something else."""
    query, key, value = (operand_at(node, place) for place in range(3))
    operand = argument(node, 3, "attn_mask")
    mask = _made_of(operand)
    reads = all(is_call(x, ops.cache_write) for x in (key, value))
    if not (reads and isinstance(operand, Node) and is_call(mask, ops.cache_mask)):
        raise _indirect(node)
    return Reading(node, query, key, value, Hiding(node, operand, mask))


def _scale(node: Node) -> float:
    given = argument(node, 6, "scale")
    return float(given) if given is not None else operand_at(node, 0).meta["val"].shape[-1] ** -0.5


def _indirect(node: Node) -> PassRefused:
    order = "; put int8_kv last" if is_call(operand_at(node, 1), ops.dequantize_int8) else ""
    return PassRefused(f"{describe(node)} does not read keys and values directly from a cache{order}")


def _read_otherwise(layers: Sequence[int], how: str) -> PassRefused:
    listed = ", ".join(map(str, layers))
    return PassRefused(
        f"the caches of the layers {listed} are read by something else than scaled_dot_product_attention, {how}"
    )


def _made_of(mask: object) -> object:
    """The node whose shape alone was changed into ``mask``: heads that share keys repeat a mask of their own."""
    while isinstance(mask, Node) and not is_call(mask, ops.cache_mask) and len(mask.all_input_nodes) == 1:
        mask = mask.all_input_nodes[0]
    return mask


def input_of_role(program: Program, module: GraphModule, role: str) -> Node:
    """The node of the input with a role that the program has once."""
    return next(
        node for node, spec in zip(placeholders(module), program.inputs, strict=True) if spec.role == role
    )
