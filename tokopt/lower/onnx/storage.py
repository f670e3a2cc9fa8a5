"""How the blocks of a quantized weight lie in ``weights.data``: by output, in unsigned codes and numbers of 16 bits.

``DequantizeLinear`` of a product ``x @ w`` wants codes [in, out]. Kernels read a weight output by output, and an
embedding is read row by row, so the file holds [out, in], and the graph transposes it, which engines do once, when
they load it. So the same bytes serve the portable graph, the kernels of tokopt, and an embedding that shares its
numbers with the head. Numbers that float16 holds exactly are stored in it, and widened when they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from tokopt.lower.onnx.nodes import array, discard, input_at, only_reader, other_input
from tokopt.lower.onnx.rule import Candidate, Rule, Unfit
from tokopt.lower.onnx.weights import SWAP, put_initializer

FOUR_BITS = (ir.DataType.INT4, ir.DataType.UINT4)
SIGNED = (ir.DataType.INT4, ir.DataType.INT8)


@dataclass(frozen=True)
class Blocks:
    """A weight as it is stored: codes [out, in], float32 scales and codes of zero points [out, in / group].

    ``scale`` may be widened from what is stored, and ``zero`` be one number for all.
    """

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value
    group: int

    @property
    def bits(self) -> int:
        """4 or 8."""
        return 4 if self.codes.dtype in FOUR_BITS else 8

    @property
    def middle(self) -> int:
        """Half the range of a code: the zero point of a symmetric weight."""
        return 1 << (self.bits - 1)

    @property
    def outputs(self) -> int:
        """Rows of the weight."""
        return self.size[0]

    @property
    def size(self) -> tuple[int, ...]:
        """[out, in]."""
        assert self.codes.const_value is not None
        return tuple(self.codes.const_value.shape.numpy())

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is half the range."""
        return bool((self.zeros() == self.middle).all())

    def zeros(self) -> np.ndarray:
        """The zero points, uint8 [out, in / group]."""
        made = self.zero.producer()
        return (
            array(self.zero).astype(np.uint8) if made is None else _computed(made, *map(array, made.inputs))
        )

    def scales(self) -> np.ndarray:
        """The numbers of ``scale``, float32 [out, in / group]."""
        return array(as_stored(self.scale)).astype(np.float32)


def is_blocks(node: ir.Node) -> bool:
    """Whether a node expands a weight in blocks that share a scale."""
    return node.op_type == "DequantizeLinear" and not node.domain and "block_size" in node.attributes


def blocks_of(node: ir.Node) -> Blocks | None:
    """The parts of a weight that :class:`StoreByOutput` has brought into its form; None for any other."""
    if not is_blocks(node):
        return None
    parts: list[ir.Value] = []
    for given in node.inputs:
        turn = given.producer() if given is not None else None
        if turn is None or turn.op_type != "Transpose":
            return None
        parts.append(input_at(turn, 0))
    codes, scale, zero = parts
    return Blocks(codes, scale, zero, node.attributes["block_size"].as_int())


def as_stored(value: ir.Value) -> ir.Value:
    """The initializer that a constant is widened from, or the constant itself."""
    cast = value.producer()
    return value if cast is None else input_at(cast, 0)


class StoreByOutput(Rule[ir.Node]):
    """``DequantizeLinear`` of codes [in, out] as that of transposed codes [out, in]."""

    name: ClassVar[str] = "weights in blocks stored by output"

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every weight in blocks."""
        for node in list(graph):
            if is_blocks(node):
                yield (node,)

    def match(self, graph: ir.Graph, candidate: Candidate) -> ir.Node:
        """The node, whose operands are constants [in, out]."""
        (node,) = candidate
        if any(value is None or value.const_value is None for value in node.inputs):
            raise Unfit("it is computed")
        codes = input_at(node, 0).const_value
        if node.attributes.get_int("axis", 1) or codes is None or codes.shape.rank() != 2:
            raise Unfit("its blocks do not lie along the inputs")
        return node

    def fuse(self, graph: ir.Graph, site: ir.Node) -> None:
        """Other initializers, and transpositions of them."""
        before = list(site.inputs)
        codes, scale, *zeros = (array(value).T for value in before)
        name, dtype = input_at(site, 0).name, input_at(site, 0).dtype
        four = dtype in FOUR_BITS
        middle = (8 if four else 128) if dtype in SIGNED else 0
        zero = zeros[0] if zeros else np.zeros(scale.shape, np.int8)
        kind = ml_dtypes.uint4 if four else np.uint8
        codes, zero = (_moved(part, middle, kind) for part in (codes, zero))
        stored = [
            put_initializer(graph, f"{name}_by_output", codes),
            put_narrow(graph, site, f"{name}_scale_by_output", scale),
            _zeros(graph, site, f"{name}_zero_by_output", zero),
        ]
        site.resize_inputs(len(stored))
        for place, value in enumerate(stored):
            site.replace_input_with(place, turn(graph, site, value))
        for value in before:
            discard(graph, value)


def _moved(codes: np.ndarray, middle: int, kind: type) -> np.ndarray:
    """Codes around 0 as unsigned ones around ``middle``."""
    return (codes.astype(np.int16) + middle).astype(kind) if middle else codes.astype(kind, copy=False)


def _zeros(graph: ir.Graph, before: ir.Node, name: str, zero: np.ndarray) -> ir.Value:
    """Zero points; where all are one number, weights of a size share them, and of bytes the number alone is stored."""
    numbers = np.unique(zero.astype(np.uint8))
    if len(numbers) != 1:
        return put_initializer(graph, name, zero)
    name, size = f"zero_{numbers[0]}_{zero.dtype}", zero.shape
    if zero.dtype != np.uint8:
        return put_initializer(graph, f"{name}_{size[0]}_{size[1]}", zero)
    number = put_initializer(graph, name, numbers)
    shape = put_initializer(graph, f"size_{size[0]}_{size[1]}", np.array(size, np.int64))
    expanded = _insert(graph, before, "Expand", [number, shape], size)
    expanded.dtype = ir.DataType.UINT8
    return expanded


def put_narrow(graph: ir.Graph, before: ir.Node, name: str, numbers: np.ndarray) -> ir.Value:
    """Constant float32 numbers, stored in float16 where that is exact."""
    half = narrowed(numbers)
    if half is None:
        return put_initializer(graph, name, numbers)
    stored = put_initializer(graph, name, half)
    return _insert(graph, before, "Cast", [stored], numbers.shape, to=ir.DataType.FLOAT)


def narrowed(numbers: np.ndarray) -> np.ndarray | None:
    """The same numbers in float16; None where there are others among them."""
    with np.errstate(over="ignore"):
        half = numbers.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), numbers) else None


def turn(graph: ir.Graph, before: ir.Node, value: ir.Value) -> ir.Value:
    """The transposition of a matrix."""
    assert value.shape is not None
    turned = _insert(graph, before, "Transpose", [value], tuple(value.shape)[::-1], perm=SWAP)
    turned.type = value.type
    return turned


def _insert(
    graph: ir.Graph,
    before: ir.Node,
    operation: str,
    inputs: list[ir.Value],
    shape: tuple[object, ...],
    **attributes: object,
) -> ir.Value:
    made = ir.node(operation, inputs, attributes=attributes)  # type: ignore[arg-type]
    made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    made.outputs[0].shape = ir.Shape(shape)  # type: ignore[arg-type]
    graph.insert_before(before, made)
    return made.outputs[0]


@dataclass(frozen=True)
class Offset:
    """``x @ w + means(x) @ table``: what the grid of a weight in blocks leaves out, added by the means over its blocks.

    ``total`` is the sum, ``product`` the second product, whose ``table`` is [in / group, out].
    """

    total: ir.Node
    product: ir.Node
    blocks: Blocks

    @property
    def table(self) -> ir.Value:
        """What the means are multiplied with."""
        return input_at(self.product, 1)


def offset_of(product: ir.Node) -> Offset | None:
    """The offset that is added to a product with a weight in blocks, before or after its bias."""
    weight = input_at(product, 1).producer() if is_product(product) else None
    blocks = blocks_of(weight) if weight is not None else None
    if blocks is None:
        return None
    for total, other in added_to(product):
        second = other.producer()
        means = input_at(second, 0).producer() if second is not None and is_product(second) else None
        if second is not None and means is not None and _averages(means, blocks.group):
            return Offset(total, second, blocks) if means.inputs[0] is product.inputs[0] else None
        if other.const_value is None:
            return None
    return None


def added_to(node: ir.Node) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Every sum of a node's result that nothing else reads, in turn, and what is added in it."""
    value = node.outputs[0]
    while (total := only_reader(value, "Add")) is not None:
        yield total, other_input(total, value)
        value = total.outputs[0]


def is_product(node: ir.Node) -> bool:
    """Whether a node is ``x @ w``."""
    return node.op_type == "MatMul" and not node.domain


def _averages(node: ir.Node, group: int) -> bool:
    """Whether a node gives the means of [batch, tokens, in] over whole blocks of ``group``."""
    return node.op_type == "AveragePool" and all(
        list(node.attributes[key].as_ints()) == [group] for key in ("kernel_shape", "strides")
    )


@dataclass(frozen=True)
class _Minimum:
    """An offset, and the minima in float16 [out, in / group] that its table follows from."""

    offset: Offset
    half: np.ndarray


class StoreMinimum(Rule[_Minimum]):
    """The table of an offset, ``group * (minimum + middle * scale)``, computed from minima in float16.

    Files of 4-bit blocks hold a scale and a minimum of 16 bits each; ``middle`` is what codes are moved by since
    engines know no fractional zero points.
    """

    name: ClassVar[str] = "tables of offsets stored as minima"

    def candidates(self, graph: ir.Graph) -> Iterator[Candidate]:
        """Every product with an offset."""
        for node in list(graph):
            if offset_of(node) is not None:
                yield (node,)

    def match(self, graph: ir.Graph, candidate: Candidate) -> _Minimum:
        """The minima, where the table follows from them exactly."""
        offset = offset_of(candidate[0])
        assert offset is not None
        if offset.table.const_value is None:
            raise Unfit("its table is computed")
        blocks, table = offset.blocks, array(offset.table).T
        if not blocks.symmetric:
            raise Unfit("its zero points are not half the range")
        moved = np.float32(blocks.middle) * blocks.scales()
        with np.errstate(over="ignore"):
            half = (table / np.float32(blocks.group) - moved).astype(np.float16)
        if not np.array_equal((half.astype(np.float32) + moved) * np.float32(blocks.group), table):
            raise Unfit("its minima are no numbers of 16 bits")
        return _Minimum(offset, half)

    def fuse(self, graph: ir.Graph, site: _Minimum) -> None:
        """The same arithmetic in the graph, which an engine does once."""
        blocks = site.offset.blocks
        shape, before = site.half.shape, site.offset.product
        stored = put_initializer(graph, f"{blocks.codes.name}_minimum", site.half)
        middle, group = (
            put_initializer(graph, f"blocks_{what}_{size}", np.array(size, np.float32))
            for what, size in (("middle", blocks.middle), ("group", blocks.group))
        )
        wide = _insert(graph, before, "Cast", [stored], shape, to=ir.DataType.FLOAT)
        moved = _insert(graph, before, "Mul", [blocks.scale, middle], shape)
        offsets = _insert(graph, before, "Add", [wide, moved], shape)
        table = _insert(graph, before, "Mul", [offsets, group], shape)
        before.replace_input_with(1, turn(graph, before, table))


def minimum_of(offset: Offset) -> ir.Value | None:
    """The minima that :class:`StoreMinimum` stored; None where the table is stored itself."""
    value = offset.table
    for operation in ("Transpose", "Mul", "Add", "Cast"):
        node = value.producer()
        if node is None or node.op_type != operation or node.domain:
            return None
        value = input_at(node, 0)
    return value if value.const_value is not None else None


def stored_bytes(graph: ir.Graph, blocks: Blocks) -> ir.Value:
    """The codes as bytes, two of 4 bits in one: the same in the file, under another type."""
    tensor = blocks.codes.const_value
    if blocks.bits == 8:
        return blocks.codes
    assert tensor is not None
    name = f"{blocks.codes.name}_bytes"
    if not isinstance(tensor, ir.ExternalTensor):
        return put_initializer(
            graph, name, np.frombuffer(tensor.tobytes(), np.uint8).reshape(blocks.outputs, -1)
        )
    if name not in graph.initializers:
        shape = ir.Shape([blocks.outputs, tensor.nbytes // blocks.outputs])
        place = (tensor.location, tensor.offset, tensor.length, ir.DataType.UINT8)
        held = ir.ExternalTensor(*place, shape=shape, name=name, base_dir=tensor.base_dir)
        graph.register_initializer(
            ir.Value(name=name, shape=shape, type=ir.TensorType(held.dtype), const_value=held)
        )
    return graph.initializers[name]


STORED = ("Cast", "Mul", "Add", "Transpose", "Expand")
"""What the file leaves for an engine to compute of constants, once."""


def load_constants(graph: ir.Graph) -> None:
    """Compute weights and tables of offsets from what is stored, in place, as an engine does when it loads the file."""
    for node in list(graph):
        places = range(len(node.inputs)) if is_blocks(node) else (1,) if is_product(node) else ()
        for place in places:
            known = _load(graph, input_at(node, place))
            if known is not None:
                node.replace_input_with(place, known)


def _load(graph: ir.Graph, value: ir.Value) -> ir.Value | None:
    """A constant, or what follows from constants by the operations of :data:`STORED`; None for any other value."""
    node = value.producer()
    if node is None:
        return value if value.const_value is not None else None
    if node.op_type not in STORED or node.domain:
        return None
    known = [_load(graph, given) for given in node.inputs if given is not None]
    if None in known:
        return None
    return put_initializer(graph, f"{value.name}_loaded", _computed(node, *map(array, known)))


def _computed(node: ir.Node, first: np.ndarray, *second: np.ndarray) -> np.ndarray:
    if node.op_type == "Cast":
        return first.astype(ir.DataType(node.attributes.get_int("to")).numpy())
    if node.op_type == "Transpose":
        return first.transpose(node.attributes["perm"].as_ints())
    if node.op_type == "Expand":
        return np.broadcast_to(first, second[0])
    return first * second[0] if node.op_type == "Mul" else first + second[0]
