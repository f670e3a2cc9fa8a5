"""The form of a program that ONNX Runtime's CPU kernels run fastest, beside the portable one.

Attention over a cache that is written in place becomes one ``com.microsoft.GroupQueryAttention``: it reads queries,
keys and values as the projection leaves them, rotates them, writes the cache and attends, where standard ops need
twelve nodes and transpose everything. Residual sums and the norms after them become one node as well.

What attends to what stays the program's own mask, handed over as a bias, so left padding, sliding windows and evicted
slots mean what they mean in the portable form. ONNX Runtime accepts several new tokens for a batch of one only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from tokopt.ir.program import AxisRange, Program
from tokopt.lower.onnx.nodes import input_at, maker
from tokopt.lower.onnx.weights import put_initializer, take_over
from tokopt.lower.parity.check import check_parity, resized

CONTRIB = "com.microsoft"

HEADS_INNER = [0, 2, 1, 3]
"""The permutation between [batch, tokens, heads, channels] and [batch, heads, tokens, channels]."""


def lower_for_cpu(
    program: Program,
    path: Path,
    *,
    check: bool = True,
    tolerance: float | None = None,
    original: Program | None = None,
) -> Path | None:
    """Write the fused form of the portable ``<name>.onnx`` at ``path`` beside it, as ``<name>.onnxruntime.onnx``.

    Its weights are those of the portable form. ``check`` compares it with the exported program for a batch of one,
    or with ``original``, the program before it was cleaned up.
    Returns None, and writes nothing, when there is nothing to fuse. Raises LoweringError when the two disagree.
    """
    model = ir.load(path)
    if not fuse_for_cpu(model):
        return None
    fused = path.with_suffix(".onnxruntime.onnx")
    ir.save(model, fused)
    if check:
        shared = {
            node.outputs[i].name or "": input_at(node, i + 2).name or ""
            for node in model.graph
            if node.op_type == "GroupQueryAttention"
            for i in (1, 2)
        }
        check_parity(
            _one_row(original or program),
            fused,
            path.stem,
            lowered=_one_row(program),
            tolerance=tolerance,
            shared=shared,
        )
    return fused


def _one_row(program: Program) -> Program:
    """The program for a batch of one."""
    return replace(
        program,
        example=resized(program, "batch", 1),
        ranges={**program.ranges, "batch": AxisRange(1, 1)},
    )


def fuse_for_cpu(model: ir.Model) -> bool:
    """Rewrite ``model`` in place; False when there was no attention to fuse, and nothing was changed."""
    sites = [site for node in list(model.graph) if (site := _site(node)) is not None]
    if not sites:
        return False
    shared = _Shared(model.graph)
    for site in sites:
        _fuse_attention(model.graph, site, shared)
    _fuse_norms(model.graph)
    model.graph.sort()
    model.opset_imports[CONTRIB] = 1
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedFunctionsPass()(model)
    return True


@dataclass(frozen=True)
class _Cache:
    """The keys or values that an attention reads: the write, what is written, and the scale of a cache in 8 bits.

    ``new`` is [batch, key heads, tokens, channels] before it is rounded, ``scale`` [key heads, 1, channels].
    """

    write: ir.Node
    new: ir.Value
    scale: ir.Value | None


@dataclass(frozen=True)
class _Site:
    """One attention over a cache, and its sizes."""

    attention: ir.Node
    keys: _Cache
    values: _Cache
    heads: int
    key_heads: int
    channels: int

    @property
    def place(self) -> ir.Node:
        """Where what this attention needs goes: before its cache is written."""
        return self.keys.write


@dataclass(frozen=True)
class _Rotation:
    """The tables [batch, tokens, half the channels] that rotate queries and keys, and how channels are paired."""

    cos: ir.Value
    sin: ir.Value
    interleaved: int


def _site(node: ir.Node) -> _Site | None:
    """The attention at ``node`` where one kernel can do all of it, else None."""
    if node.op_type != "Attention" or node.domain or len(node.inputs) != 4 or len(node.outputs) != 1:
        return None
    query, key, value, mask = node.inputs
    if query is None or key is None or value is None or mask is None or mask.dtype != ir.DataType.BOOL:
        return None
    keys, values = _cache(key), _cache(value)
    if keys is None or values is None or (keys.scale is None) != (values.scale is None):
        return None
    held, other = input_at(keys.write, 0), input_at(values.write, 0)
    same_place = keys.write.inputs[2] is values.write.inputs[2] and held.shape == other.shape
    heads, channels, key_heads = _static(query, 1), _static(query, 3), _static(held, 1)
    if not same_place or heads is None or channels is None or key_heads is None:
        return None
    plain = query.dtype == ir.DataType.FLOAT and not node.attributes.get_int("is_causal", 0)
    fits = _static(held, 3) == channels == _static(other, 3) and not channels % 8
    return _Site(node, keys, values, heads, key_heads, channels) if plain and fits else None


def _cache(value: ir.Value) -> _Cache | None:
    """What an attention reads, where it is a cache; one in 8 bits is written with the scale that it is read with."""
    read, scale = value.producer(), None
    if read is not None and read.op_type == "dequantize_int8":
        codes, scale = read.inputs
        read = codes.producer() if codes is not None else None
    new = read.inputs[1] if read is not None and read.op_type == "cache_write" else None
    if read is None or new is None:
        return None
    if scale is not None:
        rounded = new.producer()
        if rounded is None or rounded.op_type != "quantize_int8" or rounded.inputs[1] is not scale:
            return None
        new = rounded.inputs[0]
    return _Cache(read, new, scale) if new is not None else None


def _static(value: ir.Value | None, axis: int) -> int | None:
    size = value.shape[axis] if value is not None and value.shape is not None else None
    return size if isinstance(size, int) else None


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

    def last_slots(self, site: _Site, tokens: ir.Value) -> ir.Value:
        """The last slot in use of every row after the write, int32 [batch]."""
        length = site.keys.write.inputs[2]
        key = ("last", length)
        if key not in self.known:
            count = self.size(site.place, tokens, 1)
            after = self._make(site.place, "Add", [length, count])
            last = self._make(site.place, "Sub", [after, self._number([1])])
            self.known[key] = self._make(site.place, "Cast", [last], to=ir.DataType.INT32)
        return self.known[key]

    def slots(self, site: _Site) -> ir.Value:
        """The slots of the cache, int32 []."""
        mask = site.attention.inputs[3]
        key = ("slots", mask)
        if key not in self.known:
            count = self.size(site.place, input_at(site.keys.write, 0), 2)
            scalar = self._make(site.place, "Squeeze", [count])
            self.known[key] = self._make(site.place, "Cast", [scalar], to=ir.DataType.INT32)
        return self.known[key]

    def bias(self, site: _Site) -> ir.Value:
        """The mask as what is added to the logits."""
        mask = site.attention.inputs[3]
        key = ("bias", mask)
        if key not in self.known:
            seen = put_initializer(self.graph, "bias_seen", np.array(0, np.float32))
            hidden = put_initializer(self.graph, "bias_hidden", np.array(np.finfo(np.float32).min))
            self.known[key] = self._make(site.place, "Where", [mask, seen, hidden])
        return self.known[key]

    def table(self, site: _Site, table: ir.Value) -> ir.Value:
        """A rotation table by row and token, [at least slots, half the channels]: the op wants one row per slot."""
        key = ("table", table, site.attention.inputs[3])
        if key not in self.known:
            rows = self._make(site.place, "Reshape", [table, self._number([-1, site.channels // 2])])
            slots = self.size(site.place, input_at(site.keys.write, 0), 2)
            ends = self._make(site.place, "Concat", [self._number([0, 0]), slots, self._number([0])], axis=0)
            self.known[key] = self._make(site.place, "Pad", [rows, ends])
        return self.known[key]

    def rows(self, site: _Site, tokens: ir.Value) -> ir.Value:
        """Where each token's row of the tables is, int64 [batch, tokens]."""
        key = ("rows", site.keys.write.inputs[2])
        if key not in self.known:
            shape = self._make(site.place, "Shape", [tokens], start=0, end=2)
            count = self._make(site.place, "ReduceProd", [shape], keepdims=0)
            index = self._make(site.place, "Range", [self._number(0), count, self._number(1)])
            self.known[key] = self._make(site.place, "Reshape", [index, shape])
        return self.known[key]


def _fuse_attention(graph: ir.Graph, site: _Site, shared: _Shared) -> None:
    queries, keys, values = input_at(site.attention, 0), site.keys.new, site.values.new
    rotation = _rotation(site, queries, keys)
    if rotation is not None:
        queries, keys = input_at(maker(queries), 0), input_at(maker(keys), 0)
    parts = [_unsplit(graph, site, value) for value in (queries, keys, values)]
    tokens = parts[0]
    given: list[ir.Value | None] = [
        *(_packed(parts) or parts),
        site.keys.write.inputs[0],
        site.values.write.inputs[0],
    ]
    given += [shared.last_slots(site, tokens), shared.slots(site)]
    if rotation is None:
        given += [None, None, None]
    else:
        tables = [shared.table(site, table) for table in (rotation.cos, rotation.sin)]
        given += [*tables, shared.rows(site, tokens)]
    attributes: dict[str, int | float | str] = {
        "num_heads": site.heads,
        "kv_num_heads": site.key_heads,
        "scale": site.attention.attributes.get_float("scale", site.channels**-0.5),
        "softcap": site.attention.attributes.get_float("softcap", 0.0),
        "do_rotary": int(rotation is not None),
        "rotary_interleaved": rotation.interleaved if rotation else 0,
    }
    given.append(shared.bias(site))
    if site.keys.scale is not None and site.values.scale is not None:
        given += [None, *(_four_axes(graph, scale) for scale in (site.keys.scale, site.values.scale))]
        kinds = ("k_quant_type", "v_quant_type")
        attributes |= {**dict.fromkeys(kinds, "PER_CHANNEL"), "kv_cache_bit_width": 8}
    fused = ir.node(
        "GroupQueryAttention",
        given,
        attributes=attributes,
        domain=CONTRIB,
        num_outputs=3,
    )
    fused.metadata_props.update(site.attention.metadata_props)
    graph.insert_before(site.place, fused)
    _replace(graph, site, fused)


def _four_axes(graph: ir.Graph, scale: ir.Value) -> ir.Value:
    """A scale as [1, key heads, 1, channels]."""
    assert scale.const_value is not None
    return put_initializer(graph, f"{scale.name}_row", scale.const_value.numpy()[None])


def _rotation(site: _Site, queries: ir.Value, keys: ir.Value) -> _Rotation | None:
    """The rotation of queries and keys where both have the same one and nothing else reads them rotated."""
    makers = queries.producer(), keys.producer()
    if any(m is None or m.op_type != "RotaryEmbedding" or m.domain or len(m.inputs) != 3 for m in makers):
        return None
    first, second = makers
    assert first is not None and second is not None
    pairs = [maker.attributes.get_int("interleaved", 0) for maker in (first, second)]
    whole = all(not maker.attributes.get_int("rotary_embedding_dim", 0) for maker in (first, second))
    tables = first.inputs[1:]
    same = tables[0] is second.inputs[1] and tables[1] is second.inputs[2] and pairs[0] == pairs[1]
    cos, sin = tables
    if not same or not whole or cos is None or sin is None or site.channels % 16:
        return None
    return _Rotation(cos, sin, pairs[0])


def _unsplit(graph: ir.Graph, site: _Site, value: ir.Value) -> ir.Value:
    """[batch, heads, tokens, channels] as [batch, tokens, heads x channels]: what it was made of, where it was."""
    inner = value.producer()
    if inner is not None and _permutation(inner) == HEADS_INNER:
        split = input_at(inner, 0)
        view = split.producer()
        flat = view.inputs[0] if view is not None and view.op_type == "Reshape" else None
        if flat is not None and _rank(flat) == 3:
            return flat
        nodes = []
    else:
        nodes = [ir.node("Transpose", [value], attributes={"perm": HEADS_INNER})]
        split = nodes[0].outputs[0]
    shape = put_initializer(graph, "heads_together", np.array([0, 0, -1], np.int64))
    nodes.append(ir.node("Reshape", [split, shape]))
    graph.insert_before(site.place, nodes)
    return nodes[-1].outputs[0]


def _packed(parts: Sequence[ir.Value]) -> list[ir.Value | None] | None:
    """Queries, keys and values as the one tensor that was split into them."""
    maker = parts[0].producer()
    if maker is None or maker.op_type != "Split" or list(maker.outputs) != list(parts):
        return None
    return [maker.inputs[0], None, None]


def _replace(graph: ir.Graph, site: _Site, fused: ir.Node) -> None:
    output, keys, values = fused.outputs
    for new, write in ((keys, site.keys.write), (values, site.values.write)):
        old = write.outputs[0]
        new.type, new.shape = old.type, old.shape
        take_over(new, old)
    old = site.attention.outputs[0]
    output.type = old.type
    for transpose in [use.node for use in old.uses()]:
        for view in [use.node for use in transpose.outputs[0].uses()]:
            target = view.outputs[0]
            if _permutation(transpose) == HEADS_INNER and view.op_type == "Reshape" and _rank(target) == 3:
                output.shape = target.shape
                take_over(output, target)
    if not old.uses():
        return
    shape = put_initializer(
        graph, f"heads_{site.heads}_{site.channels}", np.array([0, 0, site.heads, -1], np.int64)
    )
    view = ir.node("Reshape", [output, shape])
    outer = ir.node("Transpose", [view.outputs[0]], attributes={"perm": HEADS_INNER})
    graph.insert_after(fused, [view, outer])
    take_over(outer.outputs[0], old)


def _permutation(node: ir.Node | None) -> list[int] | None:
    if node is None or node.op_type != "Transpose":
        return None
    return list(node.attributes.get_ints("perm", ()))


def _rank(value: ir.Value) -> int | None:
    return len(value.shape) if value.shape is not None else None


def _fuse_norms(graph: ir.Graph) -> None:
    """``RMSNormalization(a + b)`` as one node that gives the norm and the sum."""
    for norm in list(graph):
        if norm.op_type != "RMSNormalization" or norm.domain or norm.attributes.get_int("axis", -1) != -1:
            continue
        total = norm.inputs[0]
        add = total.producer() if total is not None else None
        if total is None or add is None or add.op_type != "Add" or total.is_graph_output():
            continue
        first, second = add.inputs
        if first is None or second is None or first.shape != second.shape or _rank(first) != 3:
            continue
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [first, second, norm.inputs[1]],
            attributes={"epsilon": epsilon},
            domain=CONTRIB,
            num_outputs=4,
        )
        fused.metadata_props.update(norm.metadata_props)
        graph.insert_before(add, fused)
        for new, old in ((fused.outputs[0], norm.outputs[0]), (fused.outputs[3], total)):
            new.type, new.shape = old.type, old.shape
            take_over(new, old)
