"""Where the step of a language model keeps keys and values, and which attention reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from tokopt.analysis.rotation import Rotary
from tokopt.errors import PassRefused
from tokopt.ir.export import placeholders
from tokopt.ir.format import State
from tokopt.ir.graph import argument, attention_nodes, describe, is_call, operand_at
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

    ``layer`` is the layer of the states ``key_state`` and ``value_state``; ``keys`` and ``values`` are the
    ``cache_write`` calls on them; ``mask`` is the ``cache_mask`` call that hides slots, with its sliding ``window`` (0
    for none). ``rotary`` is how positions rotate the keys, once it was looked for.
    """

    layer: int
    node: Node
    keys: Node
    values: Node
    mask: Node
    key_state: str
    value_state: str
    rotary: Rotary | None = None

    @property
    def query(self) -> Node:
        """Queries [batch, heads, tokens, channels], as the attention takes them."""
        query = self.node.args[0]
        assert isinstance(query, Node)
        return query

    @property
    def window(self) -> int:
        """Sliding window in positions, 0 for none."""
        window = argument(self.mask, 4, "window")
        assert isinstance(window, int)
        return window

    @property
    def scale(self) -> float:
        """What query-key products are multiplied by."""
        given = argument(self.node, 6, "scale")
        return float(given) if given is not None else self.query.meta["val"].shape[-1] ** -0.5

    @property
    def traits(self) -> AttentionTraits:
        """What it has in common with other layers."""
        return AttentionTraits(self.window, self.scale, self.rotary)


def cached_attentions(
    program: Program, module: GraphModule, states: Sequence[State]
) -> list[CachedAttention]:
    """Every attention of a program that reads a cache, by layer; ``module`` is the program's open graph.

    Raises PassRefused when one does not read a cache of its own directly, or when something else reads a cache.
    """
    known = {state.name: state for state in states}
    held = {node: spec.state for node, spec in zip(placeholders(module), program.inputs, strict=True)}
    found: dict[int, CachedAttention] = {}
    nodes = attention_nodes(module.graph)
    for node in nodes:
        key, value, mask = operand_at(node, 1), operand_at(node, 2), _made_of(argument(node, 3, "attn_mask"))
        key_state, value_state = (
            held.get(operand_at(x, 0)) if is_call(x, ops.cache_write) else None for x in (key, value)
        )
        layer = known[key_state].layer if key_state is not None else None
        if key_state is None or layer is None or value_state is None or not is_call(mask, ops.cache_mask):
            order = "; put int8_kv last" if is_call(key, ops.dequantize_int8) else ""
            raise PassRefused(f"{describe(node)} does not read keys and values directly from a cache{order}")
        found[layer] = CachedAttention(layer, node, key, value, mask, key_state, value_state)
    if len(found) != len(nodes):
        raise PassRefused("two attentions read the same cache")
    layers = {state.layer for state in states if state.kind == "key" and state.name in held.values()}
    if others := sorted(layer for layer in layers if layer is not None and layer not in found):
        raise PassRefused(
            f"the caches of the layers {', '.join(map(str, others))} are read by something else than "
            "scaled_dot_product_attention: by attention with capped logits, sinks or a form of its own"
        )
    return [found[layer] for layer in sorted(found)]


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
