"""What no output reads is not computed."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch.fx import Graph, Node

from tokopt.analysis.reads import VIEWS, Part, find_parts, fixed_read, operands_read, part_read
from tokopt.ir.bundle import Bundle, Semantics
from tokopt.ir.graph import SDPA, aten, drop_dead, is_call, is_tensor
from tokopt.ir.program import Program, Reductions
from tokopt.kernels import declared
from tokopt.pipeline.base import Context, Pass, PassResult
from tokopt.rewrite.edit import after, call, close_graph, open_graph


@dataclass(frozen=True)
class DropUnread(Pass):
    """Computes only the tokens that outputs read: a class token's feature needs no other token of the last block.

    Fixed places that are read along one axis (``x[:, 0]``) are all that is computed of what works on each place alone:
    norms, linears, activations, sums, and the queries of an attention. Keys and values stay whole. A merge or a
    selection of which only protected tokens are read is left out.

    Rules. Export to ONNX and TensorRT runs it, on every program that an entry of the schedule runs; outputs stay what
    they were. A token reduction that follows it needs all tokens: it starts from the program before, and what it leaves
    unread is dropped by the export.
    """

    name: ClassVar[str] = "drop_unread"
    semantics: ClassVar[Semantics] = "exact"

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Drop what is not read from every program that the schedule runs."""
        matches, notes = 0, list[str]()
        for name in bundle.entries:
            dropped = drop(bundle.programs[name])
            if dropped is None:
                continue
            bundle = bundle.with_program(name, dropped.program)
            matches += dropped.products + dropped.reductions
            notes += [f"{name}: {line}" for line in dropped.lines()]
        return PassResult(bundle, matches, tuple(notes) if matches else ("everything is read",))


@dataclass(frozen=True)
class Dropped:
    """A program without what is not read: how many linears and attentions compute less, and reductions are gone."""

    program: Program
    products: int
    reductions: int

    def lines(self) -> list[str]:
        """What was dropped, for the user."""
        lines = []
        if self.products:
            lines.append(f"linears and attentions that compute only what is read of them: {self.products}")
        if self.reductions:
            lines.append(f"reductions left out, of which only protected tokens are read: {self.reductions}")
        return lines


def drop(program: Program) -> Dropped | None:
    """The program with nothing computed that no output reads; None where everything is read."""
    module = open_graph(program)
    reductions = 0
    while _pass_reduction(module.graph):
        drop_dead(module.graph)
        reductions += 1
    parts = find_parts(module.graph)
    products = sum(is_call(node, aten.linear, aten.addmm, SDPA) for node in parts)
    if not products and not reductions:
        return None
    for node in list(module.graph.nodes):
        if node in parts:
            _narrow(node, parts)
        elif (read := fixed_read(node)) is not None and node.args[0] in parts:
            _read_part(node, read, parts)
    # What a further token reduction starts from: it has to see the tokens that are gone now.
    before = program.reductions or Reductions(program, ())
    return Dropped(replace(close_graph(program, module), reductions=before), products, reductions)


def _pass_reduction(graph: Graph) -> bool:
    """Let what reads only protected tokens after one merge or selection read them before it, in place."""
    parts = find_parts(graph)
    for node in graph.nodes:
        given, prefix = _reduced(node)
        if given is None:
            continue
        part = part_read(node, parts)
        if part is None or part.axis != 1 or part.stop > prefix:
            continue
        with after(node):
            protected = call(graph, aten.slice.Tensor, given, 1, 0, part.stop, like=node)
        protected.meta["val"] = node.meta["val"]  # its readers are going to read less of it
        node.replace_all_uses_with(protected)
        return True
    return False


def _reduced(node: Node) -> tuple[Node | None, int]:
    """The tokens that a node chose or merged from, and how many of them lead unchanged; None for any other node."""
    taker = node.args[0] if node.target is operator.getitem and node.args[1] == 0 else node
    op = declared(taker.target) if isinstance(taker, Node) and is_tensor(node) else None
    takes = op.takes if op is not None else None
    if takes is None or (takes.axis is not None and taker.args[takes.axis] != 1):  # type: ignore[union-attr]
        return None, 0
    given, keep = taker.args[0], taker.args[takes.keep]  # type: ignore[union-attr]
    if not isinstance(given, Node) or not isinstance(keep, Node) or keep.target is not operator.getitem:
        return None, 0
    chosen, place = keep.args
    op = declared(chosen.target)  # type: ignore[union-attr]
    if op is None or op.choice is None or op.choice.prefix is None or place:
        return None, 0
    return given, chosen.args[op.choice.prefix]  # type: ignore[union-attr,return-value]


def _narrow(node: Node, parts: dict[Node, Part]) -> None:
    """Let a node compute its part alone, in place."""
    part = parts[node]
    for operand, axis in operands_read(node, part.axis) or ():
        taken = _take(node, operand, Part(axis, part.start, part.stop), parts)
        node.args = tuple(taken if one is operand else one for one in node.args)
        node.kwargs = {name: taken if one is operand else one for name, one in node.kwargs.items()}
    if is_call(node, *VIEWS):
        shape = list(node.args[1])  # type: ignore[arg-type]
        if shape[part.axis] != -1:
            shape[part.axis] = part.stop - part.start
        node.update_arg(1, shape)


def _take(reader: Node, node: Node, part: Part, parts: dict[Node, Part]) -> Node:
    """A part of what is left of ``node``."""
    left = parts.get(node, Part(part.axis, 0, node.meta["val"].shape[part.axis]))
    if left == part:
        return node
    op = declared(node.target)
    if op is not None and op.rounds and op.elementwise:
        # Engines fuse a product with the rounding right before it.
        taken = _take(reader, node.args[0], part, parts)  # type: ignore[arg-type]
        with reader.graph.inserting_before(reader):
            return call(reader.graph, node.target, taken, *node.args[1:], like=node)  # type: ignore[arg-type]
    with reader.graph.inserting_before(reader):
        ends = (part.start - left.start, part.stop - left.start)
        return call(reader.graph, aten.slice.Tensor, node, part.axis, *ends, like=reader)


def _read_part(node: Node, read: Part, parts: dict[Node, Part]) -> None:
    """Let a read count from the start of the part that its operand now is."""
    given = node.args[0]
    assert isinstance(given, Node)
    start, stop = read.start - parts[given].start, read.stop - parts[given].start
    node.args = (given, read.axis, start) if is_call(node, aten.select) else (given, read.axis, start, stop)
