"""Bodies of functions that turn codes in blocks back into numbers, in standard ops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

LAST = (-1,)


class Body:
    """The nodes of a function, in order, and its inputs by name."""

    def __init__(self, names: Sequence[str]) -> None:
        self.inputs = {name: ir.Value(name=name) for name in names}
        self.nodes: list[ir.Node] = []

    def op(self, operation: str, given: Sequence[ir.Value], **attributes: object) -> ir.Value:
        """The output of one more node."""
        return self.several(operation, given, 1, **attributes)[0]

    def several(
        self, operation: str, given: Sequence[ir.Value], count: int, **attributes: object
    ) -> list[ir.Value]:
        """The outputs of one more node."""
        node = ir.node(operation, given, attributes=attributes, num_outputs=count)  # type: ignore[arg-type]
        for place, output in enumerate(node.outputs):
            output.name = f"value_{len(self.nodes)}" + (f"_{place}" if place else "")
        self.nodes.append(node)
        return list(node.outputs)

    def call(self, function: str, given: Sequence[ir.Value]) -> ir.Value:
        """The output of a function of the domain ``tokopt``."""
        value = self.op(function, given)
        self.nodes[-1].domain = "tokopt"
        return value

    def constant(self, number: float | Sequence[int], dtype: type[np.generic]) -> ir.Value:
        """A number, or a list of them."""
        return self.op("Constant", [], value=ir.tensor(np.array(number, dtype)))

    def after(self, value: ir.Value, constant: ir.Value) -> ir.Value:
        """A constant that is there once ``value`` is.

        ONNX Runtime computes first what follows from constants alone, and would hold all weights expanded at a time.
        """
        nothing = self.op("Shape", [value], start=0, end=0)
        shape = self.op("Concat", [nothing, self.op("Shape", [constant])], axis=0)
        return self.op("Reshape", [constant, shape])

    def blocks(
        self, bits: int, codes: ir.Value, scale: ir.Value, zero: ir.Value | None, minimum: ir.Value | None
    ) -> ir.Value:
        """``(codes - zero) * scale`` or ``codes * scale + minimum``, float32 [..., blocks, group].

        ``codes`` [..., in] are bytes, of 4 bits two in one; the others are [..., blocks]. Where
        there is neither of the last two, the zero point is half the range.
        """
        numbers = self._unpacked(codes) if bits == 4 else codes
        shape = self.op("Concat", [self.op("Shape", [scale]), self.constant(LAST, np.int64)], axis=0)
        weight = self.op("Cast", [self.op("Reshape", [numbers, shape])], to=ir.DataType.FLOAT)
        if zero is not None:
            weight = self.op("Sub", [weight, self._per_block(zero)])
        elif minimum is None:
            weight = self.op("Sub", [weight, self.constant(1 << (bits - 1), np.float32)])
        weight = self.op("Mul", [weight, self._per_block(scale)])
        return weight if minimum is None else self.op("Add", [weight, self._per_block(minimum)])

    def _per_block(self, values: ir.Value) -> ir.Value:
        """[..., blocks] as float32 [..., blocks, 1]."""
        wide = self.op("Cast", [values], to=ir.DataType.FLOAT)
        return self.op("Unsqueeze", [wide, self.constant(LAST, np.int64)])

    def _unpacked(self, codes: ir.Value) -> ir.Value:
        """Two codes of every byte, the low one first: [..., in / 2, 2]."""
        last = self.constant(LAST, np.int64)
        low = self.op("BitwiseAnd", [codes, self.constant(15, np.uint8)])
        high = self.op("BitShift", [codes, self.constant(4, np.uint8)], direction="RIGHT")
        return self.op("Concat", [self.op("Unsqueeze", [half, last]) for half in (low, high)], axis=-1)

    def graph(self, outputs: Sequence[ir.Value], opset: int) -> ir.Graph:
        """The body, complete."""
        imports = {"": opset} | {node.domain: 1 for node in self.nodes if node.domain}
        return ir.Graph(list(self.inputs.values()), outputs, nodes=self.nodes, opset_imports=imports)
