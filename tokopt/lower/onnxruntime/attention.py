"""Attention over a cache that is written in place, as one ``com.microsoft.GroupQueryAttention``.

The kernel reads queries, keys and values as the projection leaves them, rotates them, writes the cache and attends,
where standard ops need twelve nodes and transpose everything. What attends to what stays the program's own mask, handed
over as a bias, so left padding, sliding windows and evicted slots mean what they mean in the portable form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from tokopt.lower.onnx.nodes import input_at, maker
from tokopt.lower.onnx.rule import Candidate, Left, Outcome, Rule, Unfit, place
from tokopt.lower.onnx.weights import put_initializer, take_over
from tokopt.lower.onnxruntime.causal import require_causal

CONTRIB = "com.microsoft"

HEADS_INNER = [0, 2, 1, 3]
"""The permutation between [batch, tokens, heads, channels] and [batch, heads, tokens, channels]."""


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

    @property
    def mask(self) -> ir.Value:
        """What attends to what."""
        return input_at(self.attention, 3)


@dataclass(frozen=True)
class _Rotation:
    """The tables [batch, tokens, half the channels] that rotate queries and keys, and how channels are paired."""

    cos: ir.Value
    sin: ir.Value
    interleaved: int


class AttentionOverCache(Rule[_Site]):
    """``Attention`` and the writes of the cache that it reads.

    ``aliases`` (``{output: input}``) are the program's caches, ``causal`` names the input that the kernel's caller
    promises to be lower-triangular, if there is one: inside, the kernel lets no new token see a later one.
    """

    name: ClassVar[str] = "attention and its cache as one node"

    def __init__(self, graph: ir.Graph, aliases: Mapping[str, str], causal: str | None) -> None:
        self.aliases, self.causal = aliases, causal
        self._shared = _Shared(graph)
        self._rotated, self._unrotated = 0, list[Left]()

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every attention of a program that has a cache."""
        for node in list(graph):
            if self.aliases and node.op_type == "Attention" and not node.domain:
                yield (node,)

    def match(self, graph: ir.Graph, candidate: Candidate) -> _Site:
        """The caches, and the sizes that the kernel has to know."""
        (node,) = candidate
        query, key, value = (input_at(node, place) for place in range(3))
        _check_operands(node, query)
        keys, values = _cache(key, "keys"), _cache(value, "values")
        if (keys.scale is None) != (values.scale is None):
            raise Unfit("its keys or its values are in 8 bits, and not both")
        held, other = input_at(keys.write, 0), input_at(values.write, 0)
        if keys.write is values.write:
            raise Unfit("its keys are its values")
        if keys.write.inputs[2] is not values.write.inputs[2] or held.shape != other.shape:
            raise Unfit("its keys and values have other sizes, or are written at other slots")
        for cache in (keys, values):
            self._check_write(cache.write)
        heads, channels, key_heads = _static(query, 1), _static(query, 3), _static(held, 1)
        if heads is None or channels is None or key_heads is None:
            raise Unfit("its heads or channels are no fixed number")
        if _static(held, 3) != channels or channels % 8:
            raise Unfit(
                f"its heads have {channels} channels, which must be those of the cache and a multiple of 8"
            )
        site = _Site(node, keys, values, heads, key_heads, channels)
        require_causal(site.mask, input_at(keys.write, 2), self.causal)
        _check_order(site)
        return site

    def fuse(self, graph: ir.Graph, site: _Site) -> None:
        """One node that gives the attention's result and both caches."""
        try:
            rotation = _rotation(site)
            self._rotated += rotation is not None
        except Unfit as reason:
            rotation = None
            self._unrotated.append(Left(place(site.attention), str(reason)))
        _fuse_attention(graph, site, rotation, self._shared)

    @property
    def rotations(self) -> Outcome:
        """Which of the nodes so far rotate queries and keys, too."""
        return Outcome("rotations of queries and keys in that node", self._rotated, tuple(self._unrotated))

    def _check_write(self, write: ir.Node) -> None:
        """The kernel writes a buffer that the caller keeps, and nobody but one attention may ask it to."""
        made, held = write.outputs[0], input_at(write, 0)
        if not held.is_graph_input() or self.aliases.get(made.name or "") != held.name:
            raise Unfit("its cache is no state that one write makes the next of")
        readers = {reader for value in _read_as(made) for reader in _attentions(value)}
        if len(readers) > 1:
            raise Unfit(f"its cache is read by {len(readers)} attentions, each of which would write it")


def _check_operands(node: ir.Node, query: ir.Value) -> None:
    if len(node.inputs) < 4 or node.inputs[3] is None:
        raise Unfit("it has no mask")
    if len(node.inputs) > 4 or len(node.outputs) > 1:
        raise Unfit("it takes or gives more than the kernel does")
    if input_at(node, 3).dtype != ir.DataType.BOOL:
        raise Unfit("its mask is numbers to add, which do not say what is hidden")
    if node.attributes.get_int("is_causal", 0):
        raise Unfit("it is causal beside its mask")
    if query.dtype != ir.DataType.FLOAT:
        raise Unfit(f"it computes in {str(query.dtype).lower()}, not in float")


def _cache(value: ir.Value, what: str) -> _Cache:
    """What an attention reads, where it is a cache; one in 8 bits is written with the scale that it is read with."""
    read, scale = value.producer(), None
    if read is not None and read.op_type == "dequantize_int8":
        codes, scale = input_at(read, 0), input_at(read, 1)
        read = codes.producer()
        if scale.const_value is None:
            raise Unfit(f"the scales of its {what} are no constants")
    if read is None or read.op_type != "cache_write":
        raise Unfit(f"its {what} are not read from a cache as it was written")
    new = input_at(read, 1)
    if scale is not None:
        rounded = new.producer()
        if rounded is None or rounded.op_type != "quantize_int8" or rounded.inputs[1] is not scale:
            raise Unfit(f"its {what} are not rounded with the scale that they are read with")
        new = input_at(rounded, 0)
    return _Cache(read, new, scale)


def _read_as(cache: ir.Value) -> list[ir.Value]:
    """What a cache is read as: itself, and its numbers where it holds codes."""
    made = [use.node for use in cache.uses() if use.node.op_type == "dequantize_int8"]
    return [cache, *(node.outputs[0] for node in made)]


def _attentions(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses() if use.node.op_type == "Attention" and not use.node.domain]


def _check_order(site: _Site) -> None:
    """The kernel writes and attends at once, so what it needs cannot come from what it writes."""
    given = [site.attention.inputs[0], site.keys.new, site.values.new, site.mask, site.keys.write.inputs[2]]
    seen: set[ir.Node] = set()
    stack = [value.producer() for value in given if value is not None]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [value.producer() for value in node.inputs if value is not None]
    if site.keys.write in seen or site.values.write in seen:
        raise Unfit("its queries or its mask are computed from the cache that it writes")


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
        mask = site.mask
        key = ("slots", mask)
        if key not in self.known:
            count = self.size(site.place, input_at(site.keys.write, 0), 2)
            scalar = self._make(site.place, "Squeeze", [count])
            self.known[key] = self._make(site.place, "Cast", [scalar], to=ir.DataType.INT32)
        return self.known[key]

    def bias(self, site: _Site) -> ir.Value:
        """The mask as what is added to the logits."""
        mask = site.mask
        key = ("bias", mask)
        if key not in self.known:
            seen = put_initializer(self.graph, "bias_seen", np.array(0, np.float32))
            hidden = put_initializer(self.graph, "bias_hidden", np.array(np.finfo(np.float32).min))
            self.known[key] = self._make(site.place, "Where", [mask, seen, hidden])
        return self.known[key]

    def table(self, site: _Site, table: ir.Value) -> ir.Value:
        """A rotation table by row and token, [at least slots, half the channels]: the op wants one row per slot."""
        key = ("table", table, site.mask)
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


def _fuse_attention(graph: ir.Graph, site: _Site, rotation: _Rotation | None, shared: _Shared) -> None:
    queries, keys, values = input_at(site.attention, 0), site.keys.new, site.values.new
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


def _rotation(site: _Site) -> _Rotation | None:
    """The rotation of queries and keys; None where nothing rotates either. Raises Unfit where the kernel cannot."""
    rotations = [
        node
        for value in (input_at(site.attention, 0), site.keys.new)
        if (node := value.producer()) is not None and node.op_type == "RotaryEmbedding" and not node.domain
    ]
    if not rotations:
        return None
    if len(rotations) < 2:
        raise Unfit("of queries and keys only one is rotated right before")
    if any(len(node.inputs) != 3 for node in rotations):
        raise Unfit("the angles are read by position")
    if any(node.attributes.get_int("rotary_embedding_dim", 0) for node in rotations):
        raise Unfit("some channels are not rotated")
    queries, keys = rotations
    interleaved = queries.attributes.get_int("interleaved", 0)
    if queries.inputs[1:] != keys.inputs[1:] or interleaved != keys.attributes.get_int("interleaved", 0):
        raise Unfit("queries and keys have other angles")
    if site.channels % 16:
        raise Unfit(f"its heads have {site.channels} channels, which is no multiple of 16")
    return _Rotation(input_at(queries, 1), input_at(queries, 2), interleaved)


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
