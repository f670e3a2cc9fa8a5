"""Factors per channel move into the weights before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokopt.analysis.constants import constants, evaluate
from tokopt.analysis.linears import EXPANDING, Linear, as_linear
from tokopt.ir.bundle import Bundle, Semantics
from tokopt.ir.graph import aten, is_call, is_tensor, module_path, same_size, value_users
from tokopt.ir.program import Program
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal
from tokopt.rewrite.edit import close_graph, open_graph, put_parameter
from tokopt.rewrite.scales import keeps_channels

Scale = Callable[[Tensor], None]
"""Multiplies one operand by a factor per channel [out]."""


@dataclass(frozen=True)
class FoldScales(Pass):
    """Multiplies a constant factor per channel of a linear's result (LayerScale) into its weight and bias.

    Of codes it is multiplied into the scales, so nothing is rounded anew. What lies between the linear and its factor
    may be a bias, a factor per token (``int8``), a sum of linears (``keep_grid``), or another view.

    Rules. Export to ONNX and TensorRT runs it, on every program. A linear whose result or weight is read by something
    else, or whose weight is neither float32 nor codes, is refused.
    """

    name: ClassVar[str] = "fold_scales"
    semantics: ClassVar[Semantics] = "exact"

    @property
    def data_free(self) -> bool:
        """Weights alone are read and changed."""
        return True

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Fold in every program."""
        matches, notes, refusals = 0, list[str](), list[Refusal]()
        for name, program in bundle.programs.items():
            folded, count, refused = fold(program)
            bundle = bundle.with_program(name, folded) if count else bundle
            matches += count
            refusals += refused
            notes += [f"{name}: factors multiplied into weights: {count}"] if count else []
        if not matches and not refusals:
            notes = ["no linear has a factor per channel"]
        return PassResult(bundle, matches, tuple(notes), tuple(refusals))


def fold(program: Program) -> tuple[Program, int, list[Refusal]]:
    """The program with its factors folded, how many they were, and the linears whose factors stay."""
    if not any(_Graph(program.module).factors()):
        return program, 0, []
    module = open_graph(program)
    graph, count, refusals = _Graph(module), 0, list[Refusal]()
    for node, value, factor in graph.factors():
        try:
            scales = graph.scales(value, node)
        except _NoLinear:
            continue
        except _Stays as reason:
            refusals.append(
                Refusal(module_path(value) or str(value), f"its factor stays beside it: {reason}")
            )
            continue
        channels = evaluate(module, factor, {}).reshape(-1)
        for scale in scales:
            scale(channels)
        node.replace_all_uses_with(value)
        module.graph.erase_node(node)
        count += 1
    return (close_graph(program, module) if count else program), count, refusals


class _NoLinear(Exception):
    """What is multiplied is more than the result of linears."""


class _Stays(Exception):
    """The reason why a linear cannot take its factor."""


class _Graph:
    """What the search for factors has to know of a graph."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.constants = constants(module.graph)

    def factors(self) -> Iterator[tuple[Node, Node, Node]]:
        """Every product of a value with a constant per channel: the product, the value, the constant.

        The next one is looked for when the one before is folded.
        """
        for node in list(self.module.graph.nodes):
            if not is_call(node, aten.mul.Tensor):
                continue
            for value, factor in (node.args[:2], node.args[1::-1]):
                if is_tensor(value) and value not in self.constants and self._per_channel(factor, value):
                    assert isinstance(factor, Node)
                    yield node, value, factor
                    break

    def scales(self, value: Node, reader: Node) -> list[Scale]:
        """How the operands that ``value`` is made of, for ``reader`` alone, take the factor.

        Raises _NoLinear where it is made of more than linears, _Stays where a linear cannot take it.
        """
        linear = as_linear(value)
        if linear is not None and linear.weight in self.constants:
            return self._of_linear(linear, reader)
        if value_users(value) != [reader] or value.kwargs:
            raise _NoLinear
        if is_call(value, aten.add.Tensor) and value.args[0] is not value.args[1]:
            return [*self._of_summand(value, 0), *self._of_summand(value, 1)]
        if is_call(value, aten.mul.Tensor):
            return self._of_scaled(value)
        if is_call(value, aten._to_copy, aten.to):
            self.scales(value.args[0], value)  # type: ignore[arg-type]
            raise _Stays("its result is rounded to another type before it is multiplied")
        given = value.args[0] if value.args else None
        if not isinstance(given, Node) or not keeps_channels(value):
            raise _NoLinear
        return self.scales(given, value)

    def _of_summand(self, total: Node, place: int) -> list[Scale]:
        """One operand of a sum: a constant per channel, or again what is made of linears."""
        operand = total.args[place]
        if self._per_channel(operand, total):
            return [lambda factor: self._multiply(total, place, factor)]
        if not is_tensor(operand) or not same_size(
            operand.meta["val"].shape[-1], total.meta["val"].shape[-1]
        ):
            raise _NoLinear
        return self.scales(operand, total)

    def _of_scaled(self, product: Node) -> list[Scale]:
        """What is multiplied by a factor per token; where it is no linear's, as in a norm, nobody expects a fold."""
        for one, other in (product.args[:2], product.args[1::-1]):
            if is_tensor(one) and is_tensor(other) and _per_token(other) and not _per_token(one):
                try:
                    return self.scales(one, product)
                except _Stays:
                    break
        raise _NoLinear

    def _of_linear(self, linear: Linear, reader: Node) -> list[Scale]:
        """The weight and the bias of a linear."""
        node, bias = linear.node, linear.bias
        if value_users(node) != [reader]:
            raise _Stays("its result is read by something else, too")
        if node.kwargs:
            raise _Stays("it has factors of its own")
        scales = [self._of_weight(linear)]
        if bias is not None:
            if not self._per_channel(bias, node):
                raise _Stays("its bias is not one number per channel")
            place = node.args.index(bias)
            scales.append(lambda factor: self._multiply(node, place, factor))
        return scales

    def _of_weight(self, linear: Linear) -> Scale:
        """The weight of a linear, or its scales where it is codes."""
        weight, dtype = linear.weight, linear.weight.meta["val"].dtype
        if dtype != torch.float32:
            raise _Stays(f"its weight is {dtype}, and would be rounded anew")
        source = self._source(weight)
        if source.op == "get_attr":
            shape = (1, -1) if linear.transposed else (-1, 1)
            return lambda factor: self._multiply(linear.node, linear.place, factor.view(shape))
        turned = is_call(weight, aten.t.default) and weight.args[0] is source
        if turned != linear.transposed or not (turned or source is weight):
            raise _Stays("its weight is computed from codes by more than a scale")
        return lambda factor: self._multiply(source, 1, factor[:, None])

    def _source(self, weight: Node) -> Node:
        """The parameter that a weight is a view of, or the call that computes it from codes; read by nothing else."""
        node = weight
        while not is_call(node, *EXPANDING):
            if len(node.users) > 1 or (node.op == "get_attr" and self._is_shared(node)):
                raise _Stays("its weight is read by something else, too")
            if node.op == "get_attr":
                return node
            if len(node.all_input_nodes) > 1:
                raise _Stays("its weight is computed from several parameters")
            node = node.all_input_nodes[0]
        if len(node.users) > 1:
            raise _Stays("its weight is read by something else, too")
        return node

    def _is_shared(self, parameter: Node) -> bool:
        nodes = self.module.graph.find_nodes(op="get_attr", target=parameter.target)
        return sum(len(node.users) for node in nodes) > 1

    def _multiply(self, reader: Node, place: int, factor: Tensor) -> None:
        """Multiply the constant that an argument is."""
        operand = reader.args[place]
        assert isinstance(operand, Node)
        value = evaluate(self.module, operand, {}) * factor
        self.constants.add(put_parameter(self.module, reader, place, value))

    def _per_channel(self, node: object, value: Node) -> bool:
        """Whether a node is a constant with one number for every channel of a value, in its dtype."""
        if not isinstance(node, Node) or node not in self.constants or not is_tensor(node):
            return False
        given, channels = node.meta["val"], value.meta["val"].shape[-1:]
        if not isinstance(next(iter(channels), None), int) or given.dtype != value.meta["val"].dtype:
            return False
        vector = tuple(given.shape) == (1,) * (given.ndim - 1) + tuple(channels)
        return vector and given.numel() > 1 and given.ndim <= value.meta["val"].ndim


def _per_token(node: Node) -> bool:
    """Whether a node's value is the same for all channels."""
    shape = node.meta["val"].shape
    return len(shape) > 0 and isinstance(shape[-1], int) and shape[-1] == 1
