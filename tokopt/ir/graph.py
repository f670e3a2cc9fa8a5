"""Small questions about FX nodes that every analysis asks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard, cast

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default

HIDDEN = -1e4
"""Additive masks at or below this hide a key."""


def is_call(node: object, *targets: object) -> TypeGuard[Node]:
    """Whether ``node`` calls one of ``targets`` (OpOverload, or OpOverloadPacket for all its overloads)."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    return node.target in targets or getattr(node.target, "overloadpacket", None) in targets


def is_op(node: object, name: str) -> bool:
    """Whether ``node`` calls the operator of this name, ``"tokopt::cache_write"`` for example."""
    target = getattr(node, "target", None)
    return isinstance(target, OpOverload) and target.name().partition(".")[0] == name


def tensor_inputs(node: Node) -> list[Node]:
    """The operands of ``node`` that are tensors or tuples of tensors, in order, lists flattened."""
    return [operand for operand in node.all_input_nodes if is_tensor(operand) or is_tensor_list(operand)]


def is_tensor(node: object) -> TypeGuard[Node]:
    """Whether the node's value is a tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def is_tensor_list(node: Node) -> bool:
    """Whether the node's value is a list of tensors (``split``, ``unbind``)."""
    value = node.meta.get("val")
    return is_group(value) and any(isinstance(v, torch.Tensor) for v in value)


def is_group(value: object) -> TypeGuard[tuple[object, ...] | list[object]]:
    """Whether a value is a tuple or a list."""
    return isinstance(value, (tuple, list))


def size_hint(size: int | torch.SymInt) -> int:
    """The size under the example inputs: exact for an int, the traced hint for a symbol."""
    if isinstance(size, int):
        return size
    symbolic = cast(Any, size).node  # torch leaves it untyped
    hint = symbolic.hint
    return int(hint if hint is not None else symbolic.shape_env.size_hint(symbolic.expr))


def sizes(node: Node) -> tuple[int, ...]:
    """The node's shape under the example inputs."""
    return tuple(size_hint(s) for s in node.meta["val"].shape)


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are the same expression (no guard is added)."""
    return str(a) == str(b)


def reaches(start: Node) -> set[Node]:
    """All nodes downstream of ``start`` by value, without it; sizes carry no value."""
    return _closure([start], lambda n: n.users)


def ancestors(node: Node) -> set[Node]:
    """All nodes upstream of ``node`` by value, without it."""
    return _closure([node], lambda n: n.all_input_nodes)


def _closure(start: list[Node], step: Callable[[Node], Iterable[Node]]) -> set[Node]:
    seen: set[Node] = set()
    stack = list(start)
    while stack:
        for following in step(stack.pop()):
            if following not in seen and not is_call(following, aten.sym_size):
                seen.add(following)
                stack.append(following)
    return seen


def value_users(node: Node) -> list[Node]:
    """Users of the node's value: everything but ``sym_size`` and what asserts its dtype."""
    return [user for user in node.users if not is_call(user, aten.sym_size, aten._assert_tensor_metadata)]


def attention_nodes(graph: Graph) -> list[Node]:
    """Every scaled-dot-product attention of the graph, in execution order."""
    return [node for node in graph.nodes if is_call(node, SDPA)]


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """A call's argument, however it was passed."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def operand_at(node: Node, place: int) -> Node:
    """The positional argument at ``place`` of a call that takes a node there."""
    given = node.args[place]
    assert isinstance(given, Node), f"argument {place} of {node.format_node()} is no node"
    return given


def function_of(node: Node) -> Callable[..., Any]:
    """The function that a ``call_function`` node calls."""
    assert callable(node.target), f"{node.format_node()} is no call of a function"
    return node.target


def results(graph: Graph) -> list[Node]:
    """The node of every output, in order."""
    given = graph.output_node().args[0]
    assert is_group(given)
    nodes = [node for node in given if isinstance(node, Node)]
    assert len(nodes) == len(given), "an output is no node"
    return nodes


def drop_dead(graph: Graph) -> None:
    """Delete the nodes that nothing reads, also those that torch takes for random: a program draws no numbers."""
    drop_asserts(graph)
    graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))


def drop_asserts(graph: Graph) -> None:
    """Delete what asserts dtypes, derived anew when the graph is closed, and values, which no artifact looks at."""
    for node in list(graph.nodes):
        if is_call(node, aten._assert_tensor_metadata, aten._assert_scalar):
            graph.erase_node(node)


def module_path(node: Node) -> str:
    """The dotted path, in the user's model, of the module whose code made this node."""
    stack: dict[str, tuple[str, object]] = node.meta.get("nn_module_stack") or {}
    return innermost(path for path, _ in stack.values())


def innermost(paths: Iterable[str]) -> str:
    """The last of nested module paths that is one of the user's model, as the user would write it.

    >>> innermost(["", "model", "model.encoder@1"])
    'encoder'
    """
    shown = [re.sub(r"@\d+$", "", re.sub(r"^(model)(\.|$)", "", path)) for path in paths]
    return next((path for path in reversed(shown) if path), "")


def parameter_path(node: Node) -> str:
    """The dotted path, in the user's model, of the parameter that a ``get_attr`` node reads."""
    return re.sub(r"^model\.", "", str(node.target))


def source_line(node: Node) -> str:
    """``file:line`` of the innermost frame of the user's code that made this node."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def describe(node: Node) -> str:
    """How an error names a node: the op, its module path and source line."""
    name = str(node.target).removeprefix("aten.")
    where = module_path(node)
    line = source_line(node)
    return name + (f" at {where}" if where else "") + (f" ({line})" if line else "")


def common_prefix(paths: Iterable[str]) -> str:
    """The longest common dotted prefix of module paths.

    >>> common_prefix(["layers.0.attention", "layers.0.mlp"])
    'layers.0'
    """
    split: Sequence[Sequence[str]] = [path.split(".") for path in paths]
    common: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
