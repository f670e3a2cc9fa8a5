"""Attention over a cache that is written in place, as one ``com.microsoft.GroupQueryAttention``.

What attends to what stays the program's own mask, handed over as a bias, so left padding, sliding windows and evicted
slots mean what they mean in the portable form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from tokopt.lower.onnx.cached import CachedAttentions, Rotation, Site, packed
from tokopt.lower.onnx.nodes import input_at
from tokopt.lower.onnx.rule import Unfit
from tokopt.lower.onnx.weights import put_initializer
from tokopt.lower.onnxruntime.causal import require_causal

CONTRIB = "com.microsoft"


class AttentionOverCache(CachedAttentions):
    """``Attention`` and the writes of the cache that it reads.

    ``causal`` names the input that the kernel's caller promises to be lower-triangular, if there is one: inside, the
    kernel lets no new token see a later one.
    """

    name: ClassVar[str] = "attention and its cache as one node"

    def __init__(self, graph: ir.Graph, aliases: Mapping[str, str], causal: str | None) -> None:
        super().__init__(aliases)
        self.causal = causal
        self._shared = _Shared(graph)

    def check(self, site: Site) -> None:
        """The kernel takes channels in eights, and hides later tokens."""
        if site.channels % 8:
            raise Unfit(f"its heads have {site.channels} channels, which must be a multiple of 8")
        require_causal(site.mask, site.length, self.causal)

    def check_rotation(self, site: Site) -> None:
        """The kernel rotates channels in sixteens."""
        if site.channels % 16:
            raise Unfit(f"its heads have {site.channels} channels, which is no multiple of 16")

    def node(
        self, graph: ir.Graph, site: Site, parts: Sequence[ir.Value], rotation: Rotation | None
    ) -> ir.Node:
        """The op, with what it wants to know of slots and rows."""
        shared, tokens = self._shared, parts[0]
        given = [*packed(parts), site.keys.write.inputs[0], site.values.write.inputs[0]]
        given += [shared.last_slots(site, tokens), shared.slots(site)]
        if rotation is None:
            given += [None, None, None]
        else:
            tables = [shared.table(site, table) for table in (rotation.cos, rotation.sin)]
            given += [*tables, shared.rows(site, tokens)]
        attributes: dict[str, int | float | str] = {
            "num_heads": site.heads,
            "kv_num_heads": site.key_heads,
            "scale": site.scale,
            "softcap": site.softcap,
            "do_rotary": int(rotation is not None),
            "rotary_interleaved": rotation.interleaved if rotation else 0,
        }
        given.append(shared.bias(site))
        if site.keys.scale is not None and site.values.scale is not None:
            given += [None, *(_four_axes(graph, scale) for scale in (site.keys.scale, site.values.scale))]
            kinds = ("k_quant_type", "v_quant_type")
            attributes |= {**dict.fromkeys(kinds, "PER_CHANNEL"), "kv_cache_bit_width": 8}
        return ir.node("GroupQueryAttention", given, attributes=attributes, domain=CONTRIB, num_outputs=3)


def _four_axes(graph: ir.Graph, scale: ir.Value) -> ir.Value:
    """A scale as [1, key heads, 1, channels]."""
    assert scale.const_value is not None
    return put_initializer(graph, f"{scale.name}_row", scale.const_value.numpy()[None])


class _Shared:
    """What many layers read, computed once: lengths, biases, rotation tables."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.known: dict[tuple[object, ...], ir.Value] = {}

    def _make(
        self, before: ir.Node, operation: str, inputs: Sequence[ir.Value | None], **attributes: int
    ) -> ir.Value:
        made = ir.node(operation, inputs, attributes=attributes)
        self.graph.insert_before(before, made)
        return made.outputs[0]

    def _number(self, value: int | list[int]) -> ir.Value:
        name = f"int64_{value}".replace(" ", "")
        return put_initializer(self.graph, name, np.array(value, np.int64))

    def size(self, before: ir.Node, value: ir.Value, axis: int) -> ir.Value:
        """The size of an axis, int64 [1]."""
        key = ("size", value, axis)
        if key not in self.known:
            self.known[key] = self._make(before, "Shape", [value], start=axis, end=axis + 1)
        return self.known[key]

    def last_slots(self, site: Site, tokens: ir.Value) -> ir.Value:
        """The last slot in use of every row after the write, int32 [batch]."""
        length = site.keys.write.inputs[2]
        key = ("last", length)
        if key not in self.known:
            count = self.size(site.place, tokens, 1)
            after = self._make(site.place, "Add", [length, count])
            last = self._make(site.place, "Sub", [after, self._number([1])])
            self.known[key] = self._make(site.place, "Cast", [last], to=ir.DataType.INT32)
        return self.known[key]

    def slots(self, site: Site) -> ir.Value:
        """The slots of the cache, int32 []."""
        mask = site.mask
        key = ("slots", mask)
        if key not in self.known:
            count = self.size(site.place, input_at(site.keys.write, 0), 2)
            scalar = self._make(site.place, "Squeeze", [count])
            self.known[key] = self._make(site.place, "Cast", [scalar], to=ir.DataType.INT32)
        return self.known[key]

    def bias(self, site: Site) -> ir.Value:
        """The mask as what is added to the logits."""
        mask = site.mask
        key = ("bias", mask)
        if key not in self.known:
            seen = put_initializer(self.graph, "bias_seen", np.array(0, np.float32))
            hidden = put_initializer(self.graph, "bias_hidden", np.array(np.finfo(np.float32).min))
            self.known[key] = self._make(site.place, "Where", [mask, seen, hidden])
        return self.known[key]

    def table(self, site: Site, table: ir.Value) -> ir.Value:
        """A rotation table by row and token, [at least slots, half the channels]: the op wants one row per slot."""
        key = ("table", table, site.mask)
        if key not in self.known:
            rows = self._make(site.place, "Reshape", [table, self._number([-1, site.channels // 2])])
            slots = self.size(site.place, input_at(site.keys.write, 0), 2)
            ends = self._make(site.place, "Concat", [self._number([0, 0]), slots, self._number([0])], axis=0)
            self.known[key] = self._make(site.place, "Pad", [rows, ends])
        return self.known[key]

    def rows(self, site: Site, tokens: ir.Value) -> ir.Value:
        """Where each token's row of the tables is, int64 [batch, tokens]."""
        key = ("rows", site.keys.write.inputs[2])
        if key not in self.known:
            shape = self._make(site.place, "Shape", [tokens], start=0, end=2)
            count = self._make(site.place, "ReduceProd", [shape], keepdims=0)
            index = self._make(site.place, "Range", [self._number(0), count, self._number(1)])
            self.known[key] = self._make(site.place, "Reshape", [index, shape])
        return self.known[key]
