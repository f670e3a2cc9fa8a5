"""Predict the time of a program from its shapes: a roofline per op, on rates measured on this machine.

The prediction is for comparing two versions of one program. An op takes the longer of its arithmetic at the
machine's rate and its traffic at the machine's copy rate, plus a fixed cost per launch. That last term, with the
matching itself, is why merging does not pay on short inputs. A product with quantized weights is one op, as engines
fuse it: it reads the packed weight and computes at the rate of its kind.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from tokopt.analysis.constants import evaluate
from tokopt.analysis.cost import SizesOf, node_bytes, node_flops
from tokopt.ir.bundle import Bundle
from tokopt.ir.graph import ancestors, aten, is_call, is_tensor, operand_at, sizes
from tokopt.ir.program import Program
from tokopt.ir.shapes import sizes_at, with_shapes
from tokopt.kernels import declared, ops
from tokopt.kernels.declaration import Work
from tokopt.measure.machine import ROWS, Kind, Machine

_LAUNCH = 5e-6
"""Seconds that an engine spends per op beside the op's own work."""


def predict_seconds(program: Program, machine: Machine) -> float:
    """The predicted time of one call of ``program`` under its example inputs."""
    return Roofline(program).seconds(machine)


def predict_exits(bundle: Bundle, machine: Machine) -> dict[int, float]:
    """The predicted time of a batch whose rows all leave after so many blocks, for every exit of an encoder."""
    seconds, found = 0.0, dict[int, float]()
    for entry in bundle.schedule.of_role("encode"):
        seconds += predict_seconds(bundle.programs[entry.program], machine)
        if entry.program in bundle.exits:
            found[entry.depth] = seconds
    return found


@dataclass(frozen=True)
class _Product:
    """A product of ``given`` with a parameter: what engines compute, and the bytes of the weight as it is stored.

    ``weight`` is the parameter's node, or the one that expands it from ``codes``. Of its ``experts`` those are read
    that are chosen.
    """

    node: Node
    given: Node
    weight: Node
    kind: Kind
    numbers: int
    stored: int
    codes: Tensor | None = None
    experts: int = 1


class Roofline:
    """The predicted times of a program, whose weights are looked at once."""

    def __init__(self, program: Program) -> None:
        self.module: GraphModule = with_shapes(program)
        self.products: dict[Node, _Product] = {}
        self.fused: set[Node] = set()
        self.weight_bytes = sum(t.numel() * t.element_size() for t in self.module.state_dict().values())
        halved: set[int] = set()
        for node in self.module.graph.nodes:
            if is_call(node, aten.embedding):
                self._read_rows(operand_at(node, 0))
            if (product := _product(self.module, node)) is None:
                continue
            self.products[node] = product
            codes = product.codes
            if codes is None:
                continue
            self.fused |= {product.weight, *(user for user in product.weight.users if is_call(user, *_TURNS))}
            if product.kind == "4 bits" and id(codes) not in halved:
                halved.add(id(codes))
                self.weight_bytes -= codes.numel() // 2

    def _read_rows(self, table: Node) -> None:
        """Of a table of codes, rows alone are expanded."""
        made = {table, *ancestors(table)} - self.fused
        if any(node.op == "placeholder" for node in made):
            return
        self.fused |= made
        for node in made:
            if is_call(node, ops.dequantize_weight):
                codes = evaluate(self.module, operand_at(node, 0), {})
                self.weight_bytes -= codes.numel() // 2 if int(codes.max()) < 16 else 0

    def seconds(self, machine: Machine, axes: Mapping[str, int] | None = None) -> float:
        """The time of one call with these sizes of the named axes, by default the example's."""
        number = sizes_at(self.module, axes or {})

        def shape(node: Node) -> tuple[int, ...]:
            return tuple(map(number, node.meta["val"].shape))

        total = 0.0
        for node in self.module.graph.nodes:
            if node.op != "call_function" or node in self.fused:
                continue
            if node in self.products:
                total += _product_seconds(self.products[node], machine, shape)
            elif _computes(node, shape):
                total += _seconds(_work(node, shape, number), machine)
        return total


_TURNS = (aten.t, aten.transpose, aten.view)
"""What stands between a weight and its product: an axis for the experts, too."""


def _operands(node: Node) -> tuple[object, object] | None:
    """The activation and the weight of a product, if the node is one."""
    if is_call(node, aten.linear, aten.mm, aten.matmul):
        return node.args[0], node.args[1]
    if is_call(node, ops.expert_linear):
        return node.args[0], node.args[2]
    return (node.args[1], node.args[2]) if is_call(node, aten.addmm) else None


def _product(module: GraphModule, node: Node) -> _Product | None:
    """How engines compute a product with a parameter; None for other nodes.

    What is done to expanded codes before they are multiplied (other than a transpose) makes it one in float.
    """
    given, weight = _operands(node) or (None, None)
    if not isinstance(given, Node) or not isinstance(weight, Node):
        return None
    experts = sizes(weight)[0] if is_call(node, ops.expert_linear) else 1
    if is_call(weight, *_TURNS):
        weight = operand_at(weight, 0)
    numbers = math.prod(sizes(weight))
    if weight.op == "get_attr":
        stored = numbers * weight.meta["val"].element_size()
        return _Product(node, given, weight, "float", numbers, stored, experts=experts)
    if not is_call(weight, ops.dequantize_weight):
        return None
    codes, scale, zero = (evaluate(module, operand_at(weight, place), {}) for place in range(3))
    four = int(codes.max()) < 16 and int(zero.max()) < 16
    stored = numbers // (2 if four else 1) + 4 * scale.numel()
    kind: Kind = "4 bits" if four else "8 bits"
    if weight.args[3] == codes.shape[1] and is_call(given, ops.fake_quantize):
        kind = "bytes"
    return _Product(node, given, weight, kind, numbers, stored, codes, experts)


def _product_seconds(product: _Product, machine: Machine, shape: SizesOf) -> float:
    given, made = shape(product.given), shape(product.node)
    rows, part = math.prod(given[:-1]), 1.0
    if product.experts > 1:  # the rows of those that are chosen, evenly
        pairs = math.prod(made[:-1])
        chosen = min(pairs, product.experts)
        rows, part = math.ceil(pairs / max(chosen, 1)), chosen / product.experts
    moved = product.stored * part + 4 * (math.prod(given) + math.prod(made))
    work = machine.product(product.kind, rows, product.numbers * part)
    return max(work, moved / machine.bytes) + _LAUNCH


def _seconds(work: Work, machine: Machine) -> float:
    """Other products are computed at the rate of those of many rows."""
    arithmetic = machine.product("float", ROWS[-1], work.flops / (2 * ROWS[-1]))
    return max(arithmetic, work.bytes / machine.bytes) + work.launches * _LAUNCH


def _computes(node: Node, shape: SizesOf) -> bool:
    """Whether the node runs a kernel: token ops (some return tuples), and tensors that are not views."""
    if node.target is operator.getitem:
        return False
    return declared(node.target) is not None or (is_tensor(node) and node_bytes(node, shape) > 0)


def _work(node: Node, shape: SizesOf, number: Callable[[Any], int]) -> Work:
    def described(argument: object) -> object:
        """The shape of a tensor and the value of a number."""
        if not isinstance(argument, Node):
            return argument
        return shape(argument) if is_tensor(argument) else number(argument.meta["val"])

    op = declared(node.target)
    if op is not None:
        return op.work(*map(described, node.args))
    return Work(node_flops(node, shape), node_bytes(node, shape))
