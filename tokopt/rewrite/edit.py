"""The edit loop that every pass is made of: open a Program's graph, edit it, close it.

An edit inserts calls of plain Python functions written in ordinary PyTorch. A call is inlined at once: the function is
traced on the shapes and dtypes of its operands, before dispatch, so that attention stays one node, and its nodes are
copied into the graph. Closing derives every shape after the edits anew. Nothing is exported: that happens once, when
the program is lowered or saved (:attr:`tokopt.ir.program.Program.exported`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from tokopt.analysis.graph import aten, is_call
from tokopt.ir.export import copied, drop_lifts, output_specs, placeholders
from tokopt.ir.program import AxisRange, Program, TensorSpec
from tokopt.rewrite.shapes import Shapes, attribute


def open_graph(program: Program) -> GraphModule:
    """A copy of the program's graph to edit; parameters are shared."""
    known = Shapes.find(program.module)
    if known is None or not known.fits(program.inputs, program.example):
        program = replace(program, module=_with_shapes(program))
    module = copied(program.module)
    Shapes.attached(program.module).derive(module, program.ranges)
    return module


def _with_shapes(program: Program) -> GraphModule:
    """The program's graph with shapes that are functions of its named axes, derived once for all that open it."""
    key = f"tokopt.shaped {[tuple(tensor.shape) for tensor in program.example]}"
    if key not in program.module.meta:
        module = copied(program.module)
        shapes = Shapes.of(program.inputs, program.ranges, program.example)
        shapes.attach(module)
        for node, spec in zip(placeholders(module), program.inputs, strict=True):
            node.meta["val"] = shapes.blank(spec)
        shapes.refresh(module)
        program.module.meta[key] = module
    return program.module.meta[key]


def new_graph(
    inputs: Sequence[TensorSpec], ranges: Mapping[str, AxisRange], example: Sequence[Tensor]
) -> GraphModule:
    """An open graph that has inputs and no output yet."""
    module = GraphModule(torch.nn.Module(), Graph())
    shapes = Shapes.of(inputs, ranges, example)
    shapes.attach(module)
    for spec in inputs:
        module.graph.placeholder(spec.name).meta["val"] = shapes.blank(spec)
    return module


def close_graph(program: Program, module: GraphModule, **changes: Any) -> Program:
    """The Program of an edited graph.

    ``changes`` replaces fields of ``program``: its inputs, outputs or example. Axes and dtypes of outputs are derived
    from the graph, and the ranges of named axes are narrowed by what the edits take for granted. Raises PassError where
    they take more for granted than a range can say.
    """
    for node in list(module.graph.nodes):
        if is_call(node, aten._assert_tensor_metadata):  # what it asserts of dtypes is derived anew
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    drop_unused(module)
    shapes = Shapes.attached(module)
    shapes.refresh(module)
    module.graph.lint()
    module.recompile()
    closed = replace(program, module=module, reductions=None, **changes)
    used = {axis for spec in closed.inputs for axis in spec.axes}
    ranges = {axis: bounds for axis, bounds in shapes.narrowed().items() if axis in used}
    closed = replace(closed, ranges=ranges)
    return replace(closed, outputs=output_specs(closed))


def call(graph: Graph, function: Callable[..., Any], *args: Any, like: Node, **kwargs: Any) -> Any:
    """Insert what a plain function does at the graph's insertion point, attributed to ``like``'s module.

    Operands are nodes, numbers, or lists of them. Returns a node, or for a function that returns several values a tuple
    of nodes.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Node))
    nodes = [leaf for leaf in leaves if isinstance(leaf, Node)]
    module = graph.owning_module
    assert module is not None
    shapes = Shapes.attached(module)
    for node in nodes:
        if "val" not in node.meta:
            shapes.refresh(module, until=node.next)

    def on_operands(*values: Any) -> Any:
        given = iter(values)
        filled = [next(given) if isinstance(leaf, Node) else leaf for leaf in leaves]
        positional, named = pytree.tree_unflatten(filled, spec)
        return function(*positional, **named)

    with torch.no_grad(), shapes.active():
        traced = make_fx(on_operands, tracing_mode="real", pre_dispatch=True)(*(n.meta["val"] for n in nodes))
    drop_lifts(traced.graph)
    return splice(graph, traced, nodes, like=like)


def after(node: Node) -> AbstractContextManager[object]:
    """Where what is inserted comes right after ``node``; inputs stay ahead of everything.

    ``Graph.inserting_after`` would put the nodes of one call in reverse order.
    """
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return node.graph.inserting_before(following)


def call_once(reader: Node, function: Callable[..., Any], *args: Any) -> Any:
    """What a function makes of ``args``, inserted before ``reader`` or where an earlier reader asked for the same."""
    module = reader.graph.owning_module
    assert module is not None
    made = Shapes.attached(module).calls
    if (function, args) not in made:
        with reader.graph.inserting_before(reader):
            made[function, args] = call(reader.graph, function, *args, like=reader)
    return made[function, args]


def redirect(users: Sequence[Node], old: Node, new: Node) -> None:
    """Let ``users`` of a node read another one; taken before an edit, so that what it inserts still reads the old."""
    for user in users:
        user.replace_input_with(old, new)


def splice(graph: Graph, module: GraphModule, operands: list[Node], *, like: Node | None = None) -> Any:
    """Copy a whole graph, fed with ``operands``, to the insertion point; returns what it returns, as nodes.

    Nodes are attributed to ``like``'s module, or stay attributed as they are.
    """
    known: dict[Node, Any] = {}
    given = iter(operands)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(given)
        elif node.op == "output":
            return pytree.tree_map(
                lambda x: known[x] if isinstance(x, Node) else x, node.args[0], is_leaf=_is_node
            )
        elif node.op == "get_attr":
            known[node] = _take_attribute(graph, module, node)
        else:
            known[node] = graph.node_copy(node, lambda n: known[n])
        if like is not None and node.op != "placeholder":
            _attribute_to(known[node], like)
    raise AssertionError("a graph has an output")


def _is_node(value: object) -> bool:
    return isinstance(value, Node)


def _attribute_to(node: Node, like: Node) -> None:
    for key in ("nn_module_stack", "stack_trace"):
        node.meta.pop(key, None)
        if key in like.meta:
            node.meta[key] = like.meta[key]


def _take_attribute(graph: Graph, module: GraphModule, node: Node) -> Node:
    """A read of the attribute that ``node`` reads, which becomes one of the graph's own module."""
    owner = graph.owning_module
    assert owner is not None
    value = attribute(module, node)
    made = graph.get_attr(_held(owner, str(node.target), value))
    made.meta["val"] = Shapes.attached(owner).symbols.constant(value) if isinstance(value, Tensor) else value
    return made


def _held(module: GraphModule, wanted: str, value: Any) -> str:
    """The name under which the module holds a tensor or a sub-module; it is registered where it is new."""
    held = (*module.named_parameters(), *module.named_buffers(), *module.named_modules())
    for name, known in held:
        if known is value:
            return name
    stem, count = wanted.replace(".", "_"), 0
    while hasattr(module, name := f"{stem}_{count}" if count else stem):
        count += 1
    if isinstance(value, torch.nn.Module):
        module.add_module(name, value)
    else:
        module.register_buffer(name, value.detach())
    return name


def put_parameter(module: GraphModule, reader: Node, place: int | None, value: Tensor) -> Node:
    """A new parameter of the module, read by argument ``place`` of ``reader`` (None: by nothing yet)."""
    before = reader.args[place] if place is not None else None
    stem = re.sub(r"_v\d+$", "", str(before.target)) if isinstance(before, Node) else reader.name
    name = stem.replace(".", "_")
    count = sum(1 for known in module._buffers if re.fullmatch(rf"{re.escape(name)}_v\d+", known))
    name = f"{name}_v{count + 1}"
    value = value.detach().contiguous()
    module.register_buffer(name, value)
    with module.graph.inserting_before(reader):
        node = module.graph.get_attr(name)
    node.meta["val"] = Shapes.attached(module).symbols.constant(value)
    if place is not None:
        reader.update_arg(place, node)
    return node


def drop_unused(module: GraphModule) -> None:
    """Delete the parameters and buffers that the graph does not read."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    held = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for target, _ in held:
        if target not in read:
            path, _, name = target.rpartition(".")
            delattr(module.get_submodule(path), name)
