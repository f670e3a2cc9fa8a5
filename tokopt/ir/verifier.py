"""The laws that every Bundle keeps; checked before and after every pass."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch.fx import Graph, Node

from tokopt.errors import PassError
from tokopt.ir.bundle import Bundle
from tokopt.ir.export import placeholders
from tokopt.ir.graph import aten, describe, dtype_name, is_call, is_op, value_users
from tokopt.ir.program import Program
from tokopt.runtime.format.checks import FormatError, check_format

_WRITES = ("tokopt::cache_write", "tokopt::move_entries")
"""The operators that write entries into a buffer, their first operand."""


def verify_bundle(bundle: Bundle) -> None:
    """Check the description of the bundle, and that every graph is what its signature says.

    Raises PassError naming the place and the first law that is broken.
    """
    try:
        check_format(bundle.programs, bundle.states, bundle.links, bundle.schedule, bundle.generation)
    except FormatError as error:
        raise PassError(str(error)) from error
    for name, program in bundle.programs.items():
        try:
            _verify_program(program)
            _verify_aliases(program)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise PassError(f"program {name!r} is not well-formed: {error}") from error


def _verify_aliases(program: Program) -> None:
    """An output that aliases an input is that input after one ``cache_write`` or ``move_entries``, or a chain of them.

    The buffer that serves as both may hold any link of the chain when something reads it. So every other reader of a
    link, or of a view of it, must come before the next write: it must be an ancestor of that write. What the buffer
    holds after the call is the last link, so the next value of a state is no earlier one.
    """
    nodes = placeholders(program.module)
    made = program.module.graph.output_node().args[0]
    assert isinstance(made, (tuple, list))
    outputs = {spec.name: (node, spec) for spec, node in zip(program.outputs, made, strict=True)}
    buffers = dict(zip((spec.name for spec in program.inputs), nodes, strict=True))
    chains: dict[str, set[Node]] = {}
    for name, source in program.aliases.items():
        chains.setdefault(source, set()).update(_chain(name, outputs[name][0], buffers[source]))
    following = _writes_downstream(
        program.module.graph, {write for chain in chains.values() for write in chain}
    )
    for source, writes in chains.items():
        for link in (buffers[source], *writes):
            _verify_link(source, link, [write for write in writes if write.args[0] is link], following)
    for name, source in program.aliases.items():
        node, spec = outputs[name]
        _require(
            spec.state is None or all(write.args[0] is not node for write in chains[source]),
            f"{name!r} is the next value of a state and not the last that is written into {source!r}",
        )


def _chain(name: str, node: object, buffer: Node) -> Iterator[Node]:
    """The writes that lead from a buffer to an output."""
    while node is not buffer:
        _require(any(is_op(node, write) for write in _WRITES), f"{name!r} is not only written in place")
        assert isinstance(node, Node)
        yield node
        node = node.args[0]


def _writes_downstream(graph: Graph, writes: set[Node]) -> Mapping[Node, set[Node]]:
    """The writes that every node is an ancestor of by value; one sweep finds them for all."""
    found: dict[Node, set[Node]] = {}
    for node in reversed(graph.nodes):
        readers = [user for user in node.users if not is_call(user, aten.sym_size)]
        found[node] = writes.intersection(readers).union(*(found[reader] for reader in readers))
    return found


def _verify_link(source: str, link: Node, writes: list[Node], following: Mapping[Node, set[Node]]) -> None:
    _require(len(writes) <= 1, f"{source!r} is written in place twice from one value")
    for write in writes:
        for held, reader in _readers(link):
            # A write that is an output as well gets memory of its own there.
            returned = reader.op == "output" and held is link and link.op != "placeholder"
            _require(
                reader is write or write in following[reader] or returned,
                f"{describe(reader)} reads {source!r} while it is written in place",
            )


def _readers(link: Node) -> Iterator[tuple[Node, Node]]:
    """What reads a value or a view of it, which engines keep in the same memory: what is read, and the reader."""
    stack = [link]
    while stack:
        held = stack.pop()
        for reader in value_users(held):
            yield held, reader
            if _is_view(reader):
                stack.append(reader)


def _is_view(node: Node) -> bool:
    """Whether a node's value may be the memory of its operand."""
    if is_call(node, operator.getitem, aten.clone, aten.dropout):  # engines drop the last two
        return True
    schema: Any = getattr(node.target, "_schema", None)
    return schema is not None and any(made.alias_info is not None for made in schema.returns)


def _verify_program(program: Program) -> None:
    graph = program.module.graph
    graph.lint()
    inputs = placeholders(program.module)
    _require(len(inputs) == len(program.inputs), f"{len(inputs)} inputs, {len(program.inputs)} specs")
    for node, spec, example in zip(inputs, program.inputs, program.example, strict=True):
        _check_value(node, spec.name, spec.dtype, spec.axes)
        _require(dtype_name(example.dtype) == spec.dtype, f"example of {spec.name!r} is {example.dtype}")
        static = [(s, a) for s, a in zip(example.shape, spec.axes, strict=True) if isinstance(a, int)]
        _require(all(s == a for s, a in static), f"example of {spec.name!r} has shape {tuple(example.shape)}")
    outputs = graph.output_node().args[0]
    assert isinstance(outputs, (tuple, list))
    _require(len(outputs) == len(program.outputs), f"{len(outputs)} outputs, {len(program.outputs)} specs")
    for node, spec in zip(outputs, program.outputs, strict=True):
        assert isinstance(node, Node)
        _check_value(node, spec.name, spec.dtype, spec.axes)
    named = {axis for spec in program.inputs for axis in spec.axes if isinstance(axis, str)}
    _require(
        named == set(program.ranges), f"named axes {sorted(named)} but ranges for {sorted(program.ranges)}"
    )


def _check_value(node: Node, name: str, dtype: str, axes: tuple[str | int, ...]) -> None:
    value = node.meta["val"]
    _require(dtype_name(value.dtype) == dtype, f"{name!r} is {value.dtype}, its spec says {dtype}")
    _require(len(value.shape) == len(axes), f"{name!r} has {len(value.shape)} axes, its spec has {len(axes)}")
    for size, axis in zip(value.shape, axes, strict=True):
        _require(
            isinstance(size, int) == isinstance(axis, int),
            f"{name!r}: axis {axis!r} does not fit size {size}",
        )
        _require(not isinstance(axis, int) or size == axis, f"{name!r}: size {size}, spec {axis!r}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
