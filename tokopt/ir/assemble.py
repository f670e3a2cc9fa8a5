"""An open graph as an ExportedProgram, without tracing it again."""

# torch.export leaves parts of its classes untyped, and has no public way to ask what dispatch decomposes.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportPrivateUsage=false

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._export.verifier import TrainingIRVerifier
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from tokopt.ir.graph import aten, function_of, is_call, operand_at, results
from tokopt.ir.program import Program
from tokopt.ir.shapes import Shapes, attribute, described, with_shapes
from tokopt.ir.splice import splice
from tokopt.ir.trace import makes_symbols, trace

Table = Mapping[Any, Callable[..., Any]]


class Assembled(ExportedProgram):
    """An ExportedProgram that decomposes operators one by one.

    ``torch.export`` traces the whole program twice to decompose it, which takes most of the time of a lowering.
    """

    def run_decompositions(
        self,
        decomp_table: dict[Any, Callable[..., Any]] | None = None,
        decompose_custom_triton_ops: bool = False,
    ) -> ExportedProgram:
        """The program with the operators of the table decomposed; one with side effects is traced as a whole."""
        if decomp_table is None or any(map(_has_effects, self.graph.nodes)):
            return super().run_decompositions(decomp_table, decompose_custom_triton_ops)
        graph = _decomposed(self.graph_module, decomp_table)
        if any(map(_has_effects, graph.nodes)):
            return super().run_decompositions(decomp_table, decompose_custom_triton_ops)
        return _finished(graph, self._graph_signature.input_specs, self)


def assemble(program: Program) -> ExportedProgram:
    """The program with its parameters as inputs, in the form that ``torch.export`` gives."""
    module = with_shapes(program)
    shapes = Shapes.attached(module)
    shapes.active()
    graph, root = Graph(), torch.nn.Module()
    state: dict[str, Tensor] = {}
    specs: list[InputSpec] = []
    known: dict[Node, Node] = {}
    parameters: dict[str, Node] = {}
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        target, value = str(node.target), attribute(module, node)
        if not isinstance(value, Tensor):  # a branch of torch.cond
            root.add_module(target, value)
        elif target not in parameters:
            made = parameters[target] = graph.placeholder(f"p_{target.replace('.', '_')}")
            made.meta.update(node.meta)
            state[target] = value
            kind = InputKind.PARAMETER if isinstance(value, torch.nn.Parameter) else InputKind.BUFFER
            persistent = True if kind == InputKind.BUFFER else None
            specs.append(InputSpec(kind, TensorArgument(made.name), target, persistent))
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target) in parameters:
            known[node] = parameters[str(node.target)]
            continue
        known[node] = graph.node_copy(node, known.__getitem__)
        if node.op == "placeholder":
            specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(known[node].name), None))
    users = [spec.arg for spec in specs if spec.kind == InputKind.USER_INPUT]
    signature = ModuleCallSignature(
        inputs=users,
        outputs=[TensorArgument(node.name) for node in results(graph)],
        in_spec=pytree.tree_flatten((tuple(program.example), {}))[1],
        out_spec=pytree.tree_flatten(tuple(program.outputs))[1],
    )
    return Assembled(
        root,
        graph,
        ExportGraphSignature(specs, _output_specs(graph)),
        state,
        shapes.constraints(),
        [ModuleCallEntry("", signature)],
        (tuple(program.example), {}),
        verifiers=[TrainingIRVerifier],
    )


def _output_specs(graph: Graph) -> list[OutputSpec]:
    return [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results(graph)]


def _finished(graph: Graph, inputs: list[InputSpec], given: ExportedProgram) -> ExportedProgram:
    """The same program with another graph."""
    call = given.module_call_graph[0].signature
    assert call is not None
    outputs = _output_specs(graph)
    signature = ModuleCallSignature(call.inputs, [spec.arg for spec in outputs], call.in_spec, call.out_spec)
    return Assembled(
        given.graph_module,
        graph,
        ExportGraphSignature(inputs, outputs),
        given.state_dict,
        given.range_constraints,
        [ModuleCallEntry("", signature)],
        given.example_inputs,
        verifiers=[TrainingIRVerifier],
    )


def _has_effects(node: Node) -> bool:
    """Whether a node changes an operand, or holds a graph of its own."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "get_attr" or (schema is not None and schema.is_mutable)


def _decomposed(module: GraphModule, table: Table) -> Graph:
    """The graph with every operator of the table replaced by what its decomposition does."""
    graph = Graph()
    known: dict[Node, Any] = {}
    traced: dict[object, GraphModule] = {}  # the layers of a model repeat each other
    for node in module.graph.nodes:
        if node.target is operator.getitem and isinstance(known[node.args[0]], (tuple, list)):
            known[node] = known[node.args[0]][node.args[1]]
        elif _returns_operand(node):
            known[node] = known[node.args[0]]
        elif node.target in _SAME or _is_cast(node):
            known[node] = _as_another(graph, node, known)
        elif node.target in table or node.target in _UNKNOWN or _is_composite(node.target):
            if (decomposition := traced.get(likeness := _likeness(node))) is None:
                decomposition = _decomposition(node, table)
                if not makes_symbols(decomposition):
                    traced[likeness] = decomposition
            operands = [known[operand] for operand in node.all_input_nodes]
            known[node] = splice(graph, decomposition, operands, like=node)
        else:
            known[node] = graph.node_copy(node, known.__getitem__)
    graph.eliminate_dead_code()
    return graph


_SAME: Mapping[Any, Any] = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
}
"""Operators that are another one by another name, so that nothing has to be traced."""


def _elements(x: Tensor) -> Any:
    return math.prod(x.shape)


_UNKNOWN: Mapping[Any, Callable[..., Any]] = {aten.sym_numel.default: _elements}
"""What operators do that no exporter knows, and no table."""


def _returns_operand(node: Node) -> bool:
    """Whether an operator gives its first operand as it is."""
    if is_call(node, aten.dropout.default):
        return not node.args[2]
    return _is_cast(node) and bool(node.meta["val"].dtype == operand_at(node, 0).meta["val"].dtype)


def _is_cast(node: Node) -> bool:
    """Whether a tensor is brought to another dtype, and copied only where it has to be."""
    return is_call(node, aten.to.dtype) and len(node.args) == 2 and not node.kwargs


def _as_another(graph: Graph, node: Node, known: Mapping[Node, Any]) -> Node:
    """A call of the operator that ``node``'s is by another name."""
    args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
    target = _SAME.get(node.target, aten._to_copy.default)
    if _is_cast(node):
        args, kwargs = args[:1], {"dtype": args[1]}
    made = graph.create_node("call_function", target, args, kwargs, target.overloadpacket.__name__)
    made.meta = dict(node.meta)
    return made


def _decomposition(node: Node, table: Table) -> GraphModule:
    """What an operator does, as a graph of its operands in the order of ``all_input_nodes``."""
    operands = node.all_input_nodes
    mode = next(n.meta["val"].fake_mode for n in _tensors(node))

    def run(*values: Any) -> Any:
        given = dict(zip(operands, values, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), given.__getitem__)
        return _UNKNOWN.get(node.target, function_of(node))(*args, **kwargs)

    with mode:
        traced = trace(run, [operand.meta["val"] for operand in operands], decomposition_table=table)
    for made in [made for made in traced.graph.nodes if made.target is aten.sym_numel.default]:
        _spell_out(made)
    return traced


def _spell_out(count: Node) -> None:
    """Write a number of elements, which a decomposition asks for, as the product of the sizes."""
    tensor, graph, product = operand_at(count, 0), count.graph, None
    sizes = tensor.meta["val"].shape
    with graph.inserting_before(count):
        for axis in [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]:
            size = graph.call_function(aten.sym_size.int, (tensor, axis))
            size.meta["val"] = sizes[axis]
            product = size if product is None else _times(graph, product, size)
        assert product is not None, "the number would be known"
        product = _times(graph, product, math.prod(size for size in sizes if isinstance(size, int)))
    count.replace_all_uses_with(product)
    graph.erase_node(count)


def _times(graph: Graph, one: Node, other: Node | int) -> Node:
    node = graph.call_function(operator.mul, (one, other))
    node.meta["val"] = one.meta["val"] * (other.meta["val"] if isinstance(other, Node) else other)
    return node


def _likeness(node: Node) -> object:
    """What calls that decompose into the same graph have in common: operator, arguments, and their sizes."""
    place: dict[Node, Any] = {operand: _Operand(place) for place, operand in enumerate(node.all_input_nodes)}
    args, kwargs = map_arg((node.args, node.kwargs), place.__getitem__)
    sizes = tuple(described(operand.meta.get("val")) for operand in place)
    return node.target, repr(args), repr(kwargs), sizes


@dataclass(frozen=True)
class _Operand:
    place: int


@cache
def _is_composite(target: object) -> bool:
    """Whether dispatch always resolves an operator into others, so that no table can keep it."""
    return isinstance(target, OpOverload) and _is_cia_op(target) and not _is_preservable_cia_op(target)


def _tensors(node: Node) -> Iterator[Node]:
    """The node and its operands, those that are tensors without data."""
    for one in (node, *node.all_input_nodes):
        if isinstance(one.meta.get("val"), FakeTensor):
            yield one
