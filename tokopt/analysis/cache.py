"""Where the step of a language model keeps keys and values, and which attention reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import Graph, Node

from tokopt.analysis.graph import argument, attention_nodes, describe, is_call
from tokopt.errors import PassRefused
from tokopt.ir.program import Program
from tokopt.kernels import ops

if TYPE_CHECKING:
    from tokopt.analysis.rotary import Rotary


@dataclass(frozen=True)
class CachedAttention:
    """The attention of layer ``index`` over the cache in the states ``keys_index`` and ``values_index``.

    ``keys`` and ``values`` are the ``cache_write`` calls; ``mask`` is the ``cache_mask`` call that hides slots,
    with its sliding ``window`` (0 for none). ``rotary`` is how positions rotate the keys, once it was looked for.
    """

    index: int
    node: Node
    keys: Node
    values: Node
    mask: Node
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


def cached_attentions(program: Program, graph: Graph) -> list[CachedAttention]:
    """Every attention of ``step``, by layer.

    Raises PassRefused when one does not read a cache of its own directly.
    """
    names: dict[object, str] = {node: name for name, node in input_nodes(program, graph).items()}
    found = {}
    for node in attention_nodes(graph):
        key, value, mask = node.args[1], node.args[2], _made_of(argument(node, 3, "attn_mask"))
        state = names.get(key.args[0]) if is_call(key, ops.cache_write) else None  # type: ignore[union-attr]
        layer = state.removeprefix("keys_") if state else ""
        if not (layer.isdigit() and is_call(value, ops.cache_write) and is_call(mask, ops.cache_mask)):
            order = "; put int8_kv last" if is_call(key, ops.dequantize_int8) else ""
            raise PassRefused(f"{describe(node)} does not read keys and values directly from a cache{order}")
        found[int(layer)] = CachedAttention(int(layer), node, key, value, mask)  # type: ignore[arg-type]
    if len(found) != len(attention_nodes(graph)):
        raise PassRefused("two attentions read the same cache")
    return [found[layer] for layer in sorted(found)]


def _made_of(mask: object) -> object:
    """The node whose shape alone was changed into ``mask``: heads that share keys repeat a mask of their own."""
    while isinstance(mask, Node) and not is_call(mask, ops.cache_mask) and len(mask.all_input_nodes) == 1:
        mask = mask.all_input_nodes[0]
    return mask


def input_nodes(program: Program, graph: Graph) -> dict[str, Node]:
    """The placeholder of every input, by its name."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return dict(zip((spec.name for spec in program.inputs), placeholders, strict=True))
