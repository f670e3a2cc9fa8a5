"""Attention over a cache that is written in place, as forms find it that make one node of it.

Standard ops need twelve nodes, which transpose everything: the kernels behind such a node read queries, keys and values
as the projection leaves them, rotate them, write the cache and attend.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tokopt.lower.onnx.nodes import input_at, maker
from tokopt.lower.onnx.rule import Candidate, Left, Outcome, Rule, Unfit, place
from tokopt.lower.onnx.weights import put_initializer, take_over

HEADS_INNER = [0, 2, 1, 3]
"""The permutation between [batch, tokens, heads, channels] and [batch, heads, tokens, channels]."""


@dataclass(frozen=True)
class Cache:
    """The keys or values that an attention reads: the write, what is written, and the scale of a cache in 8 bits.

    ``new`` is [batch, key heads, tokens, channels] before it is rounded, ``scale`` [key heads, 1, channels].
    """

    write: ir.Node
    new: ir.Value
    scale: ir.Value | None


@dataclass(frozen=True)
class Site:
    """One attention over a cache, and its sizes."""

    attention: ir.Node
    keys: Cache
    values: Cache
    heads: int
    key_heads: int
    channels: int

    @property
    def place(self) -> ir.Node:
        """Where what this attention needs goes: before its cache is written."""
        return self.keys.write

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        return self.attention.attributes.get_float("scale", self.channels**-0.5)

    @property
    def softcap(self) -> float:
        """What scores are capped to, 0 for nothing."""
        return self.attention.attributes.get_float("softcap", 0.0)

    @property
    def length(self) -> ir.Value:
        """The first slot to write of every row [batch]."""
        return input_at(self.keys.write, 2)

    @property
    def mask(self) -> ir.Value:
        """What attends to what."""
        return input_at(self.attention, 3)


@dataclass(frozen=True)
class Rotation:
    """The tables [batch, tokens, half the channels] that rotate queries and keys, and how channels are paired."""

    cos: ir.Value
    sin: ir.Value
    interleaved: int


class CachedAttentions(Rule[Site]):
    """``Attention`` and the writes of the cache that it reads. ``aliases`` (``{output: input}``) are the caches."""

    def __init__(self, aliases: Mapping[str, str]) -> None:
        self.aliases = aliases
        self._rotated, self._unrotated = 0, list[Left]()

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every attention of a program that has a cache."""
        for node in list(graph):
            if self.aliases and node.op_type == "Attention" and not node.domain:
                yield (node,)

    def match(self, graph: ir.Graph, candidate: Candidate) -> Site:
        """The caches, and the sizes that a kernel has to know."""
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
        heads, channels, key_heads = static(query, 1), static(query, 3), static(held, 1)
        if heads is None or channels is None or key_heads is None:
            raise Unfit("its heads or channels are no fixed number")
        if static(held, 3) != channels:
            raise Unfit(f"its heads have {channels} channels, which are not those of the cache")
        site = Site(node, keys, values, heads, key_heads, channels)
        self.check(site)
        _check_order(site)
        return site

    def fuse(self, graph: ir.Graph, site: Site) -> None:
        """One node that gives the attention's result and both caches."""
        queries, keys, values = input_at(site.attention, 0), site.keys.new, site.values.new
        try:
            rotation = _rotation(site)
            if rotation is not None:
                self.check_rotation(site)
                queries, keys = input_at(maker(queries), 0), input_at(maker(keys), 0)
                self._rotated += 1
        except Unfit as reason:
            rotation = None
            self._unrotated.append(Left(place(site.attention), str(reason)))
        parts = [_unsplit(graph, site, value) for value in (queries, keys, values)]
        fused = self.node(graph, site, parts, rotation)
        fused.metadata_props.update(site.attention.metadata_props)
        graph.insert_before(site.place, fused)
        _replace(graph, site, fused)

    @abstractmethod
    def check(self, site: Site) -> None:
        """Raise Unfit for what the kernel could not compute."""

    def check_rotation(self, site: Site) -> None:
        """Raise Unfit for a rotation that stays outside; any is taken in by default."""

    @abstractmethod
    def node(
        self, graph: ir.Graph, site: Site, parts: Sequence[ir.Value], rotation: Rotation | None
    ) -> ir.Node:
        """The node that gives the result and both caches.

        ``parts`` are queries, keys and values [batch, tokens, heads x channels], before they are rotated.
        """

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


def _cache(value: ir.Value, what: str) -> Cache:
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
    return Cache(read, new, scale)


def _read_as(cache: ir.Value) -> list[ir.Value]:
    """What a cache is read as: itself, and its numbers where it holds codes."""
    made = [use.node for use in cache.uses() if use.node.op_type == "dequantize_int8"]
    return [cache, *(node.outputs[0] for node in made)]


def _attentions(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses() if use.node.op_type == "Attention" and not use.node.domain]


def _check_order(site: Site) -> None:
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


def static(value: ir.Value | None, axis: int) -> int | None:
    """The size of an axis, where it is a number."""
    size = value.shape[axis] if value is not None and value.shape is not None else None
    return size if isinstance(size, int) else None


def _rotation(site: Site) -> Rotation | None:
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
    return Rotation(input_at(queries, 1), input_at(queries, 2), interleaved)


def _unsplit(graph: ir.Graph, site: Site, value: ir.Value) -> ir.Value:
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


def packed(parts: Sequence[ir.Value]) -> list[ir.Value | None]:
    """Queries, keys and values; where one tensor was split into them, that and nothing else."""
    maker = parts[0].producer()
    if maker is None or maker.op_type != "Split" or list(maker.outputs) != list(parts):
        return list(parts)
    return [maker.inputs[0], None, None]


def _replace(graph: ir.Graph, site: Site, fused: ir.Node) -> None:
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
