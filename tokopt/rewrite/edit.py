"""The edit loop that every pass is made of: open a Program's graph, edit it, close it.

An edit inserts calls of plain Python functions written in ordinary PyTorch. A call is inlined at once: the function is
traced on the shapes and dtypes of its operands, before dispatch, so that attention stays one node, and its nodes are
copied into the graph. Closing derives every shape after the edits anew. Nothing is exported: that happens once, when
the program is lowered or saved (:func:`tokopt.ir.assemble.assemble`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
from torch.utils import _pytree as pytree

from tokopt.ir.export import copied, output_specs, placeholders
from tokopt.ir.graph import drop_dead, results
from tokopt.ir.program import AxisRange, Program, TensorSpec
from tokopt.ir.shapes import Shapes, described, with_shapes
from tokopt.ir.splice import drop_lifts, splice, splice_nodes
from tokopt.ir.trace import makes_symbols, trace


def open_graph(program: Program) -> GraphModule:
    """A copy of the program's graph to edit; parameters are shared."""
    known = with_shapes(program)
    module = copied(known)
    Shapes.attached(known).derive(module, program.ranges)
    return module


def new_graph(
    inputs: Sequence[TensorSpec], ranges: Mapping[str, AxisRange], example: Sequence[Tensor]
) -> GraphModule:
    """An open graph that has inputs and no output yet."""
    module = LazyGraphModule(torch.nn.Module(), Graph())
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
    drop_dead(module.graph)
    drop_unused(module)
    shapes = Shapes.attached(module)
    shapes.refresh(module)
    module.graph.lint()
    module.recompile()
    closed = replace(program, module=module, reductions=None, **changes)
    used = {axis for spec in closed.inputs for axis in spec.axes}
    ranges = {axis: bounds for axis, bounds in shapes.proved().items() if axis in used}
    shapes.bounds.update(ranges)
    closed = replace(closed, ranges=ranges)
    return replace(closed, outputs=output_specs(closed))


def call(graph: Graph, function: Callable[..., Any], *args: Any, like: Node, **kwargs: Any) -> Any:
    """Insert what a plain function does at the graph's insertion point, attributed to ``like``'s module.

    Operands are nodes, numbers, or lists of them. Returns a node, or for a function that returns several values a tuple
    of nodes. A function that was called before on operands of the same sizes is not traced again: equal functions have
    to do the same. So layers that are alike should call functions that are equal.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Node))
    nodes = [leaf for leaf in leaves if isinstance(leaf, Node)]
    module = graph.owning_module
    assert module is not None
    shapes = Shapes.attached(module)
    for node in nodes:
        if "val" not in node.meta:
            shapes.refresh(module, until=node.next)
    constants = tuple(Node if isinstance(leaf, Node) else (type(leaf), leaf) for leaf in leaves)
    values = [node.meta["val"] for node in nodes]
    question = (function, spec, constants, tuple(described(value) for value in values))
    filled = partial(_filled, function, leaves, spec)
    traced = shapes.once(question, partial(_trace, filled, values, shapes), makes_symbols)
    before = set(graph.nodes)
    made = splice(graph, traced, nodes, like=like)
    shapes.derived(node for node in graph.nodes if node not in before)
    return made


def _filled(function: Callable[..., Any], leaves: list[Any], spec: pytree.TreeSpec, *values: Any) -> Any:
    """The function, called with ``values`` where its arguments have nodes."""
    given = iter(values)
    args, kwargs = pytree.tree_unflatten([next(given) if isinstance(x, Node) else x for x in leaves], spec)
    return function(*args, **kwargs)


def _trace(function: Callable[..., Any], values: list[Any], shapes: Shapes) -> GraphModule:
    """What a function does to values without data, as a graph."""
    with shapes.active():
        traced = trace(function, values, pre_dispatch=True)
    drop_lifts(traced.graph)
    return traced


def inline(graph: Graph, program: Program, operands: list[Node], *, like: Node) -> list[Node]:
    """Insert all that a program does, at the graph's insertion point; the nodes of its outputs."""
    known = dict(zip(placeholders(program.module), operands, strict=True))
    inline_nodes(graph, program.module, program.module.graph.nodes, known, like=like)
    return [known[node] for node in results(program.module.graph)]


def inline_nodes(
    graph: Graph, module: GraphModule, nodes: Iterable[Node], known: dict[Node, Node], *, like: Node
) -> None:
    """Insert copies of ``nodes`` of another graph, in order, at the insertion point.

    ``known`` says what became of each. What is known before is not copied.
    """
    before = set(known)
    splice_nodes(graph, module, nodes, known, like=like)
    for node, made in known.items():
        if node not in before and made.op == "call_function":
            made.meta.pop("val", None)  # a size of the other graph


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


def put_parameter(module: GraphModule, reader: Node, place: int | None, value: Tensor) -> Node:
    """A new parameter of the module, read by argument ``place`` of ``reader`` (None: by nothing yet)."""
    before = reader.args[place] if place is not None else None
    stem = re.sub(r"_v\d+$", "", str(before.target)) if isinstance(before, Node) else reader.name
    stem = stem.replace(".", "_")
    name = next(name for i in count(1) if not hasattr(module, name := f"{stem}_v{i}"))
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
