"""Where the token axis goes: which axes of which tensors count tokens, downstream of some points of a graph.

This is the proof behind every token reduction. Starting from the tensors that will lose tokens (one per
reduced block), :func:`trace_tokens` follows the token axis through the graph by a rule per op and collects
what must change when the axis gets shorter. An op without a rule, or one that mixes or splits tokens, ends
the proof: it becomes an :class:`Obstacle`, and the caller refuses the blocks upstream of it, with the reason.
Nothing is guessed from sizes that happen to be equal.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from tokopt.ir.graph import (
    ancestors,
    argument,
    aten,
    describe,
    is_call,
    is_tensor,
    operand_at,
    size_hint,
    sizes,
    tensor_inputs,
    value_users,
)
from tokopt.kernels import declared


@dataclass(frozen=True)
class TokenAxis:
    """Axis ``dim`` of a tensor holds tokens ``start:stop`` of the stream.

    The axis may be a product: its size is ``outer * tokens * inner`` in row-major order, as after flattening
    batch and tokens into one axis. ``stop`` is None for "to the end".
    """

    dim: int
    start: int = 0
    stop: int | None = None
    outer: int = 1
    inner: int = 1

    @property
    def plain(self) -> bool:
        """Whether the axis is the tokens alone, not a product with other axes."""
        return self.outer == self.inner == 1


@dataclass(frozen=True)
class Label:
    """The token axes of one tensor, and after how many reductions of the stream it stands (``stage``)."""

    axes: tuple[TokenAxis, ...]
    stage: int

    def at(self, dim: int) -> TokenAxis | None:
        """The token axis at ``dim``, if that dim counts tokens."""
        return next((a for a in self.axes if a.dim == dim), None)


@dataclass(frozen=True)
class Resize:
    """``node`` spells a token count in its shape argument; it must follow ``operand``'s real size."""

    node: Node
    operand: Node
    before: Label
    after: Label


@dataclass(frozen=True)
class Side:
    """``operand`` of ``node`` is a per-token side tensor (position table, mask): index it by the kept tokens."""

    node: Node
    operand: Node
    axes: tuple[TokenAxis, ...]
    stage: int


@dataclass(frozen=True)
class Attend:
    """``node`` is an attention whose keys are tokens of the stream: weigh every key by the tokens it stands for.

    ``mask_axes`` are those of its mask, of ``mask_rank`` axes, that hold tokens.
    """

    node: Node
    mask_axes: tuple[TokenAxis, ...]
    mask_rank: int
    stage: int


@dataclass(frozen=True)
class Pool:
    """``node`` takes a mean or sum over tokens: weigh every token by its size."""

    node: Node
    axis: TokenAxis
    stage: int


@dataclass(frozen=True)
class Restore:
    """``node`` needs ``operand`` with all its original tokens: undo the reductions from the merge map."""

    node: Node
    operand: Node
    axes: tuple[TokenAxis, ...]
    stage: int


Edit = Resize | Side | Attend | Pool | Restore


@dataclass(frozen=True)
class Obstacle:
    """The op at which the token axis could not be followed, and why."""

    node: Node
    reason: str

    def __str__(self) -> str:
        return f"{describe(self.node)}: {self.reason}"


@dataclass
class TokenTrace:
    """The result: labels, the edits that a shorter axis needs (in graph order), the fixed positions, obstacles.

    ``fixed`` is the number of leading tokens whose slots are read by constant index downstream (a class token).
    """

    labels: dict[Node, Label] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    fixed: int = 0
    obstacles: list[Obstacle] = field(default_factory=list)


def met(where: str) -> str:
    """Why tokens that meet those of another stream cannot be followed."""
    return f"its tokens meet those of {where}, which are reduced on their own"


class _Cannot(Exception):
    """Raised by a rule that cannot follow the token axis."""


@dataclass(frozen=True)
class Seed:
    """A tensor whose token axis ``axis`` gets shorter, ``reductions`` times in a row."""

    axis: int
    reductions: int = 1


Seeds = Mapping[Node, Seed]


def trace_tokens(
    graph: Graph,
    seeds: Seeds,
    *,
    reduce: bool = True,
    beyond: Collection[Node] = (),
    others: Mapping[Node, str] | None = None,
) -> TokenTrace:
    """Follow the token axis downstream of ``seeds``.

    With ``reduce`` every seed is a place where the axis gets shorter, so a seed downstream of another starts a
    new stage. Without it the trace only says where the axis goes. An op that cannot work on fewer tokens gets all of
    them back past the last attention, those ``beyond``, of other streams' blocks, not counted. ``others`` are the nodes
    that hold the tokens of streams that get shorter too, and where each of these is: no node can follow two.
    """
    tracer = _Tracer(seeds, reduce, frozenset(beyond), others or {})
    for node in graph.nodes:
        tracer.visit(node)
    return tracer.trace


class _Tracer:
    def __init__(
        self, seeds: Seeds, reduce: bool, beyond: frozenset[Node], others: Mapping[Node, str]
    ) -> None:
        self.seeds = seeds
        self.reduce = reduce
        self.beyond = beyond
        self.others = others
        self.trace = TokenTrace()
        self.labels = self.trace.labels
        self.stage = 0

    def visit(self, node: Node) -> None:
        if any(operand in self.labels for operand in node.all_input_nodes) and not is_call(
            node, aten.sym_size
        ):
            self.follow(node)
        if node in self.seeds:
            self.start(node)

    def follow(self, node: Node) -> None:
        marks = len(self.trace.edits), self.trace.fixed
        try:
            label = self.rule(node)
            if label is not None and label.axes and node in self.others:
                raise _Cannot(met(self.others[node]))
        except _Cannot as reason:
            del self.trace.edits[marks[0] :]
            self.trace.fixed = marks[1]
            self.stop(node, str(reason))
        else:
            if label is not None and label.axes:
                self.labels[node] = label

    def start(self, node: Node) -> None:
        before, seed = self.labels.get(node), self.seeds[node]
        if self.reduce:
            if before is None and self.stage:
                self.trace.obstacles.append(Obstacle(node, "its tokens are not those of the earlier blocks"))
            if before is not None and (before.stage != self.stage or before.at(seed.axis) is None):
                self.trace.obstacles.append(
                    Obstacle(node, "its token axis is not that of the earlier blocks")
                )
            self.stage += seed.reductions
        self.labels[node] = Label((TokenAxis(seed.axis),), self.stage)

    def stop(self, node: Node, reason: str) -> None:
        """An op that cannot work on fewer tokens: past the last attention of the stream, give it all of them back."""
        downstream = [node]
        for n in downstream:
            downstream.extend(u for u in value_users(n) if u not in downstream)
        attends = (n for n in downstream if is_call(n, aten.scaled_dot_product_attention))
        if not self.reduce or any(n in self.seeds for n in downstream) or not self.beyond.issuperset(attends):
            self.trace.obstacles.append(Obstacle(node, reason))
            return
        for operand in dict.fromkeys(node.all_input_nodes):
            label = self.labels.get(operand)
            if label is not None:
                if not all(a.plain for a in label.axes):
                    self.trace.obstacles.append(Obstacle(node, reason))
                    return
                self.trace.edits.append(Restore(node, operand, label.axes, label.stage))

    # --- rules ------------------------------------------------------------------------------------------

    def rule(self, node: Node) -> Label | None:
        if node.op == "output":
            return self.output(node)
        if is_call(node, aten._assert_tensor_metadata):
            return None
        for targets, rule in _RULES:
            if is_call(node, *targets):
                return rule(self, node)
        op = declared(node.target)
        if op is not None and op.elementwise:
            return self.same(node)
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
            return self.join(node, tensor_inputs(node))
        raise _Cannot("no rule says what this op does to tokens")

    def output(self, node: Node) -> None:
        for operand in node.all_input_nodes:
            label = self.labels.get(operand)
            if label is not None:
                if not all(a.plain for a in label.axes):
                    raise _Cannot("an output mixes the token axis with another")
                self.trace.edits.append(Restore(node, operand, label.axes, label.stage))

    def only(self, node: Node, position: int = 0) -> Label:
        """The label of the operand at ``position``, every other operand being free of tokens."""
        operand = node.args[position]
        assert isinstance(operand, Node)
        if operand not in self.labels or any(
            n in self.labels for n in tensor_inputs(node) if n is not operand
        ):
            raise _Cannot("tokens come in through an unexpected operand")
        return self.labels[operand]

    def stage_of(self, operands: list[Node]) -> int:
        stages = {self.labels[n].stage for n in operands if n in self.labels}
        if len(stages) > 1:
            raise _Cannot("a skip connection joins tokens from before and after a reduction")
        return stages.pop()

    def join(self, node: Node, operands: list[Node]) -> Label:
        """Broadcasting: axes align from the right; an operand with all tokens and no label is a side tensor."""
        stage = self.stage_of(operands)
        rank = len(sizes(node))
        axes: dict[int, TokenAxis] = {}
        for operand in operands:
            shift = rank - len(sizes(operand))
            for axis in self.labels[operand].axes if operand in self.labels else ():
                moved = replace(axis, dim=axis.dim + shift)
                if axes.setdefault(moved.dim, moved) != moved:
                    raise _Cannot("operands hold different ranges of tokens")
        for operand in dict.fromkeys(operands):
            self.side(node, operand, rank - len(sizes(operand)), axes, stage)
        return Label(tuple(axes[d] for d in sorted(axes)), stage)

    def side(self, node: Node, operand: Node, shift: int, axes: dict[int, TokenAxis], stage: int) -> None:
        """Record the axes along which ``operand`` carries all tokens without being part of the stream."""
        label = self.labels.get(operand)
        needed = []
        for dim, axis in axes.items():
            own = dim - shift
            if own < 0 or (label is not None and label.at(own) is not None) or sizes(operand)[own] == 1:
                continue
            if axis.stop is not None:
                continue  # protected prefix tokens keep their slots
            if not axis.plain:
                raise _Cannot("a per-token side tensor meets a flattened token axis")
            needed.append(replace(axis, dim=own))
        if not needed:
            return
        if is_content(operand):
            raise _Cannot("a skip connection joins tokens from before and after a reduction")
        self.trace.edits.append(Side(node, operand, tuple(needed), stage))

    def same(self, node: Node) -> Label:
        return self.only(node)

    def first(self, node: Node) -> Label | None:
        """Ops that only read a dtype or shape from their second operand."""
        return self.labels.get(operand_at(node, 0))

    def features(self, node: Node, axes: int) -> Label:
        """Ops over the last ``axes`` axes, which must not be tokens."""
        label = self.only(node)
        rank = len(sizes(operand_at(node, 0)))
        if any(a.dim >= rank - axes for a in label.axes):
            raise _Cannot("it works across tokens")
        return label

    def linear(self, node: Node) -> Label:
        return self.features(node, 1)

    def layer_norm(self, node: Node) -> Label:
        return self.features(node, len(argument(node, 1, "normalized_shape")))

    def softmax(self, node: Node) -> Label:
        label = self.only(node)
        dim = argument(node, 1, "dim")
        assert isinstance(dim, int)
        if label.at(dim % len(sizes(node))):
            raise _Cannot("a softmax over tokens that is not an attention tokopt knows")
        return label

    def addmm(self, node: Node) -> Label:
        label = self.only(node, 1)
        if label.at(1):
            raise _Cannot("a product across tokens")
        return label

    def matmul(self, node: Node) -> Label:
        a, b = node.args[:2]
        assert isinstance(a, Node) and isinstance(b, Node)
        rank, rank_a, rank_b = len(sizes(node)), len(sizes(a)), len(sizes(b))
        if rank_a < 2 or rank_b < 2:
            raise _Cannot("a product with a vector")
        left, right = self.labels.get(a), self.labels.get(b)
        if (left and left.at(rank_a - 1)) or (right and right.at(rank_b - 2)):
            raise _Cannot("a product across tokens that is not an attention tokopt knows")
        stage = self.stage_of([a, b])
        axes: dict[int, TokenAxis] = {}
        for label, rank_in in ((left, rank_a), (right, rank_b)):
            for axis in label.axes if label else ():
                moved = replace(axis, dim=axis.dim + rank - rank_in)
                if axes.setdefault(moved.dim, moved) != moved:
                    raise _Cannot("operands hold different ranges of tokens")
        batch = {d: x for d, x in axes.items() if d < rank - 2}
        for operand in (a, b):
            self.side(node, operand, rank - len(sizes(operand)), batch, stage)
        return Label(tuple(axes[d] for d in sorted(axes)), stage)

    def attention(self, node: Node) -> Label:
        query, key, value = node.args[:3]
        assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
        q, k, v = (self.labels.get(n) for n in (query, key, value))
        rank = len(sizes(query))
        if any(a.dim != rank - 2 or not a.plain for label in (q, k, v) if label for a in label.axes):
            raise _Cannot("attention over something other than tokens")
        if (k is None) != (v is None) or (k and v and k.axes != v.axes):
            raise _Cannot("keys and values hold different tokens")
        if argument(node, 5, "is_causal", False):
            raise _Cannot("causal attention")
        mask = argument(node, 3, "attn_mask")
        if isinstance(mask, Node) and mask in self.labels:
            raise _Cannot("the attention mask is computed from the tokens")
        stage = self.stage_of([query, key, value])
        axes, mask_rank = self.mask_axes(mask, q, k)
        if k is not None or axes:
            self.trace.edits.append(Attend(node, axes, mask_rank, stage))
        return q if q is not None else Label((), stage)

    def mask_axes(self, mask: object, q: Label | None, k: Label | None) -> tuple[tuple[TokenAxis, ...], int]:
        """The axes of an attention mask ``[..., queries, keys]`` that hold all tokens, and its rank."""
        if not isinstance(mask, Node):
            return (), 0
        mask_rank = len(sizes(mask))
        found = list[TokenAxis]()
        for label, dim in ((q, mask_rank - 2), (k, mask_rank - 1)):
            if label is not None and dim >= 0 and sizes(mask)[dim] != 1:
                found.append(replace(label.axes[0], dim=dim))
        return tuple(found), mask_rank

    def reshape(self, node: Node) -> Label:
        operand = node.args[0]
        assert isinstance(operand, Node)
        before = self.only(node)
        old, new = sizes(operand), sizes(node)
        axes = tuple(_reshaped(axis, old, new) for axis in before.axes)
        if len({a.dim for a in axes}) < len(axes):
            raise _Cannot("two token axes become one")
        after = Label(axes, before.stage)
        self.trace.edits.append(Resize(node, operand, before, after))
        return after

    def expand(self, node: Node) -> Label:
        operand = node.args[0]
        assert isinstance(operand, Node)
        before = self.only(node)
        shift = len(sizes(node)) - len(sizes(operand))
        after = Label(tuple(replace(a, dim=a.dim + shift) for a in before.axes), before.stage)
        self.trace.edits.append(Resize(node, operand, before, after))
        return after

    def transpose(self, node: Node) -> Label:
        rank = len(sizes(node))
        named: Any = (0, 1) if is_call(node, aten.t) else node.args[1:3]
        one, two = (d % rank for d in named)
        swap = {one: two, two: one}
        return self.moved(node, lambda d: swap.get(d, d))

    def permute(self, node: Node) -> Label:
        rank = len(sizes(node))
        order = [d % rank for d in argument(node, 1, "dims")]
        return self.moved(node, order.index)

    def moved(self, node: Node, where: Callable[[int], int]) -> Label:
        label = self.only(node)
        axes = sorted((replace(a, dim=where(a.dim)) for a in label.axes), key=lambda a: a.dim)
        return Label(tuple(axes), label.stage)

    def unsqueeze(self, node: Node) -> Label:
        dim: int = argument(node, 1, "dim") % len(sizes(node))
        return self.moved(node, lambda d: d + (d >= dim))

    def squeeze(self, node: Node) -> Label:
        dims = argument(node, 1, "dim")
        rank = len(sizes(operand_at(node, 0)))
        if dims is None:
            raise _Cannot("a squeeze of unnamed axes")
        gone = {d % rank for d in ([dims] if isinstance(dims, int) else dims)}
        return self.moved(node, lambda d: d - sum(g < d for g in gone))

    def slice(self, node: Node) -> Label:
        operand = node.args[0]
        assert isinstance(operand, Node)
        label = self.only(node)
        dim = argument(node, 1, "dim", 0)
        start, stop, step = (
            argument(node, i, n, d) for i, n, d in ((2, "start", 0), (3, "end", None), (4, "step", 1))
        )
        assert isinstance(dim, int)
        axis = label.at(dim % len(sizes(operand)))
        if axis is None:
            return label
        size = sizes(operand)[axis.dim]
        start = start or 0
        stop = size if stop is None else (stop if isinstance(stop, int) else size_hint(stop.meta["val"]))
        if not isinstance(start, int) or step != 1 or not axis.plain or start < 0:
            raise _Cannot("a slice of tokens with a step or a moving start")
        cut = self.cut(axis, start, None if stop >= size else stop)
        return Label(tuple(cut if a is axis else a for a in label.axes), label.stage)

    def cut(self, axis: TokenAxis, start: int, stop: int | None) -> TokenAxis:
        """Tokens ``start:stop`` of an axis; every bound that is not the end must be a fixed slot."""
        limit = None if axis.stop is None else axis.stop - axis.start
        if stop is None or (limit is not None and stop > limit):
            stop = limit
        if stop is not None and stop < 0:
            raise _Cannot("a slice that counts tokens from the end")
        begin = axis.start + start
        end = axis.stop if stop is None else axis.start + stop
        self.trace.fixed = max(self.trace.fixed, begin, end or 0)
        return replace(axis, start=begin, stop=end)

    def select(self, node: Node) -> Label:
        operand, dim, index = node.args[:3]
        assert isinstance(operand, Node) and isinstance(dim, int)
        label = self.only(node)
        axis = label.at(dim % len(sizes(operand)))
        if axis is not None:
            if not isinstance(index, int) or index < 0 or not axis.plain:
                raise _Cannot("it reads a token whose slot is not fixed")
            self.trace.fixed = max(self.trace.fixed, axis.start + index + 1)
        gone = dim % len(sizes(operand))
        rest = (replace(a, dim=a.dim - (a.dim > gone)) for a in label.axes if a is not axis)
        return Label(tuple(rest), label.stage)

    def split(self, node: Node) -> Label:
        """Sections along tokens are cut in ``getitem``; along other axes nothing changes."""
        operand = node.args[0]
        assert isinstance(operand, Node)
        label = self.only(node)
        dim = argument(node, 2, "dim", 0)
        assert isinstance(dim, int)
        axis = label.at(dim % len(sizes(operand)))
        if axis is not None:
            sections = argument(node, 1, "split_size")
            if not is_call(node, aten.split_with_sizes) or not axis.plain or len(sections) != 2:
                raise _Cannot("tokens are split into groups")
            self.trace.edits.append(Resize(node, operand, label, label))
        return label

    def unbind(self, node: Node) -> Label:
        label = self.only(node)
        dim = argument(node, 1, "dim", 0) % len(sizes(operand_at(node, 0)))
        if label.at(dim):
            raise _Cannot("tokens are taken apart one by one")
        return Label(tuple(replace(a, dim=a.dim - (a.dim > dim)) for a in label.axes), label.stage)

    def getitem(self, node: Node) -> Label | None:
        source, index = node.args
        assert isinstance(source, Node) and isinstance(index, int)
        label = self.labels[source]
        if is_call(source, aten.split_with_sizes, aten.split):
            dim = argument(source, 2, "dim", 0) % len(sizes(operand_at(source, 0)))
            axis = label.at(dim)
            if axis is not None:
                first = argument(source, 1, "split_size")[0]
                if not isinstance(first, int):
                    raise _Cannot("tokens are split at a moving slot")
                cut = self.cut(axis, 0, first) if index == 0 else self.cut(axis, first, None)
                return Label(tuple(cut if a is axis else a for a in label.axes), label.stage)
        return label

    def cat(self, node: Node) -> Label:
        operands = [n for n in argument(node, 0, "tensors") if isinstance(n, Node)]
        dim = argument(node, 1, "dim", 0) % len(sizes(node))
        along = [self.labels[n].at(dim) for n in operands if n in self.labels]
        if not any(along):
            return self.join_cat(node, operands, dim)
        labels = [self.labels.get(n) for n in operands]
        parts = [label.at(dim) if label else None for label in labels]
        position = 0
        for part in parts:
            if part is None or not part.plain or part.start != position:
                raise _Cannot("other tokens are put between those of the stream")
            position = part.stop if part.stop is not None else -1
        if position != -1:
            raise _Cannot("only some of the tokens are put together")
        whole = TokenAxis(dim, parts[0].start if parts[0] else 0)
        others = {a for label in labels if label for a in label.axes if a.dim != dim}
        return Label(tuple(sorted({whole, *others}, key=lambda a: a.dim)), self.stage_of(operands))

    def join_cat(self, node: Node, operands: list[Node], dim: int) -> Label:
        """Concatenation of features: the operands' token axes must agree."""
        stage = self.stage_of(operands)
        axes = {a.dim: a for n in operands if n in self.labels for a in self.labels[n].axes}
        for operand in operands:
            if operand in self.labels and {a.dim: a for a in self.labels[operand].axes} != axes:
                raise _Cannot("operands hold different ranges of tokens")
            self.side(node, operand, 0, {d: a for d, a in axes.items() if d != dim}, stage)
        return Label(tuple(axes[d] for d in sorted(axes)), stage)

    def stack(self, node: Node) -> Label:
        """A new axis; the operands' token axes must agree."""
        operands = [n for n in argument(node, 0, "tensors") if isinstance(n, Node)]
        dim: int = argument(node, 1, "dim", 0) % len(sizes(node))
        axes = {self.labels[n].axes for n in operands if n in self.labels}
        if len(axes) > 1 or any(n not in self.labels for n in operands):
            raise _Cannot("operands hold different ranges of tokens")
        moved = (replace(a, dim=a.dim + (a.dim >= dim)) for a in axes.pop())
        return Label(tuple(moved), self.stage_of(operands))

    def pool(self, node: Node) -> Label:
        label, pooled = self.only(node), _reduced(node)
        for axis in label.axes:
            if axis.dim in pooled and axis.stop is None:
                if not axis.plain or len(label.axes) > 1 or len(pooled) > 1:
                    raise _Cannot("it pools tokens together with another axis")
                self.trace.edits.append(Pool(node, axis, label.stage))
        return _without(label, node, pooled)

    def extreme(self, node: Node) -> Label:
        label, pooled = self.only(node), _reduced(node)
        if any(axis.dim in pooled for axis in label.axes):
            raise _Cannot("the largest over tokens")
        return _without(label, node, pooled)


def _reduced(node: Node) -> set[int]:
    """The axes that a sum, mean or maximum takes away."""
    operand = node.args[0]
    assert isinstance(operand, Node)
    rank = len(sizes(operand))
    given = argument(node, 1, "dim")
    dims = list(range(rank)) if given is None else given
    return {d % rank for d in ([dims] if isinstance(dims, int) else dims)}


def _without(label: Label, node: Node, reduced: set[int]) -> Label:
    """The token axes that are left, where they are now."""
    shift = 0 if argument(node, 2, "keepdim", False) else 1
    kept = [a for a in label.axes if a.dim not in reduced]
    return Label(
        tuple(replace(a, dim=a.dim - shift * sum(r < a.dim for r in reduced)) for a in kept), label.stage
    )


_RULES: list[tuple[tuple[object, ...], Callable[[_Tracer, Node], Label | None]]] = [
    ((aten.linear,), _Tracer.linear),
    ((aten.layer_norm, aten.rms_norm), _Tracer.layer_norm),
    ((aten.softmax, aten._softmax, aten.log_softmax), _Tracer.softmax),
    ((aten.addmm,), _Tracer.addmm),
    ((aten.matmul, aten.bmm, aten.mm), _Tracer.matmul),
    ((aten.scaled_dot_product_attention,), _Tracer.attention),
    ((aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten), _Tracer.reshape),
    ((aten.expand,), _Tracer.expand),
    ((aten.transpose, aten.t), _Tracer.transpose),
    ((aten.permute,), _Tracer.permute),
    ((aten.unsqueeze,), _Tracer.unsqueeze),
    ((aten.squeeze,), _Tracer.squeeze),
    ((aten.slice,), _Tracer.slice),
    ((aten.select,), _Tracer.select),
    ((aten.split_with_sizes, aten.split, aten.chunk), _Tracer.split),
    ((aten.unbind,), _Tracer.unbind),
    ((operator.getitem,), _Tracer.getitem),
    ((aten.cat,), _Tracer.cat),
    ((aten.stack,), _Tracer.stack),
    ((aten.mean, aten.sum), _Tracer.pool),
    ((aten.amax, aten.amin), _Tracer.extreme),
    (
        (aten.dropout, aten.clone, aten.contiguous, aten.to, aten._to_copy, aten.alias, aten.detach),
        _Tracer.same,
    ),
    ((aten.type_as,), _Tracer.first),
    ((aten.ones_like, aten.zeros_like), _Tracer.same),
]


def _reshaped(axis: TokenAxis, old: tuple[int, ...], new: tuple[int, ...]) -> TokenAxis:
    """Where a token axis goes in a row-major reshape: the same strides to its left and right.

    >>> _reshaped(TokenAxis(1), (5, 37, 48), (5, 37, 4, 12))
    TokenAxis(dim=1, start=0, stop=None, outer=1, inner=1)
    >>> _reshaped(TokenAxis(1), (5, 37, 48), (185, 48))
    TokenAxis(dim=0, start=0, stop=None, outer=5, inner=1)
    """
    tokens = old[axis.dim] // (axis.outer * axis.inner)
    left = math.prod(old[: axis.dim]) * axis.outer
    right = math.prod(old[axis.dim + 1 :]) * axis.inner
    for dim, size in enumerate(new):
        before, after = math.prod(new[:dim]), math.prod(new[dim + 1 :])
        if left % before or right % after:
            continue
        outer, inner = left // before, right // after
        if size == outer * tokens * inner:
            return replace(axis, dim=dim, outer=outer, inner=inner)
    raise _Cannot("the token axis is split into groups (windows or a grid)")


_LEARNED = (aten.linear, aten.addmm, aten.mm, aten.embedding, aten.conv1d, aten.conv2d, aten.convolution)


def is_content(node: Node) -> bool:
    """Whether a tensor carries what the model computed from its input, rather than positions or masks."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if is_call(current, aten.scaled_dot_product_attention):
            return True
        if is_call(current, *_LEARNED) and any(n.op == "placeholder" for n in ancestors(current)):
            return True
        operands = tensor_inputs(current)
        op = declared(current.target)
        if op is not None and op.takes is not None:
            operands = operands[:1]  # which tokens were kept is a choice of positions, not content
        for operand in operands:
            if operand not in seen and not (is_call(operand, aten.sym_size) or not is_tensor(operand)):
                seen.add(operand)
                stack.append(operand)
    return False


def prefix_tokens(stream: Node) -> int:
    """How many leading tokens of ``stream`` ``[batch, tokens, channels]`` are parameters (class, registers).

    Found at the concatenation that builds the stream: parts before the first one that depends on an input.
    """
    node = stream
    while node.op == "call_function":
        if is_call(node, aten.cat) and argument(node, 1, "dim", 0) in (1, -2):
            return _leading_parameters([n for n in argument(node, 0, "tensors") if isinstance(n, Node)])
        if is_call(node, aten.slice) and argument(node, 1, "dim", 0) in (1, -2):
            operand, start = node.args[0], argument(node, 2, "start", 0)
            assert isinstance(operand, Node)
            inner = prefix_tokens(operand) - start if isinstance(start, int) else 0
            return max(0, min(inner, sizes(node)[1]))
        same = [n for n in tensor_inputs(node) if sizes(n) == sizes(node) and _from_input(n)]
        if not same:
            return 0
        node = same[0]
    return 0


def _leading_parameters(parts: list[Node]) -> int:
    count = 0
    for part in parts:
        tokens = sizes(part)[1]
        leading = prefix_tokens(part) if _from_input(part) else tokens
        count += leading
        if leading < tokens:
            break
    return count


def _from_input(node: Node) -> bool:
    return any(n.op == "placeholder" for n in {node, *ancestors(node)})
