"""The graph rewrite behind every token reduction.

:mod:`tokopt.analysis.token_axis` proves where the token axis goes and lists what must change; this module
inserts the reductions and makes those changes. A reduction is described by an :class:`Assignment`; how it
chooses tokens is the pass's business.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tokopt.analysis.blocks import Block, Site
from tokopt.analysis.token_axis import (
    Attend,
    Edit,
    Label,
    Pool,
    Resize,
    Restore,
    Side,
    TokenAxis,
    TokenTrace,
    is_content,
)
from tokopt.errors import PassRefused
from tokopt.ir.graph import (
    HIDDEN,
    ancestors,
    argument,
    aten,
    describe,
    is_call,
    operand_at,
    same_size,
    sizes,
)
from tokopt.ir.shapes import Shapes
from tokopt.kernels import ops
from tokopt.rewrite.edit import call


@dataclass(frozen=True)
class Tokens:
    """What a reduction may look at, as tensors inside the traced graph.

    ``stream`` [batch, tokens, channels] is the residual stream after the block's attention; ``query`` and
    ``key`` [batch, heads, tokens, channels] are the attention's own; ``size`` [batch, tokens] float32 is how
    many original tokens each stands for, 0 for padding; ``padded`` says whether there can be padding;
    ``scale`` is the attention's logit scale; ``bias`` [batch or 1, heads or 1, 1, tokens] is what its mask and
    sizes add to the logits of the first query (None: nothing); ``depth`` is the block's place in the model,
    from 0 to below 1.
    """

    stream: Tensor
    query: Tensor
    key: Tensor
    size: Tensor
    scale: float
    padded: bool
    bias: Tensor | None = None
    depth: float = 0.0


@dataclass(frozen=True)
class Assignment:
    """Which tokens stay and where the others go.

    ``keep`` [batch, kept] holds old indices in their new order, ``drop`` [batch, r] the removed ones, and
    ``dest`` [batch, r] the new slot that stands for each removed token. ``stream`` is the reduced residual
    stream and ``size`` [batch, kept] the new sizes.
    """

    keep: Tensor
    drop: Tensor
    dest: Tensor
    stream: Tensor
    size: Tensor


@dataclass(frozen=True)
class Reduction:
    """One reduction after ``block``.

    ``merges``: removed tokens live on in others, whose size grows. ``weighs_attention``: later attentions add
    ``log(size)``.
    """

    block: Block
    reduce: Callable[[Tokens], Assignment]
    merges: bool
    weighs_attention: bool


@dataclass
class Stage:
    """The graph nodes that describe the token axis after one reduction."""

    keep: Node  # [batch, kept]: index into the original tokens
    size: Node  # [batch, kept]
    source: Node  # [batch, tokens]: slot of every original token
    original_size: Node  # [batch, tokens]
    proportional: bool  # whether attention adds log(size)
    pruned: bool  # whether some tokens are gone from the sum of sizes


@dataclass
class TokenRewriter:
    """Inserts reductions into ``module`` and repairs everything downstream.

    ``batch`` is the batch size of the example inputs. After a reduction that ``weighs_attention``, later attentions add
    ``log(size)`` to their logits (ToMe, arXiv 2210.09461, section 3). ``restored`` lists the outputs that got all their
    tokens back.
    """

    module: GraphModule
    batch: int
    padded: bool = False
    stages: list[Stage] = field(default_factory=list)
    restored: list[int] = field(default_factory=list)
    _reduced: dict[Node, Node] = field(default_factory=dict)
    _masks: dict[tuple[Node | None, int, int, int], Node] = field(default_factory=dict)
    _sides: dict[tuple[Node, tuple[TokenAxis, ...], int, int], Node] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.module.graph

    # --- inserting a reduction --------------------------------------------------------------------------

    def apply(self, reductions: Sequence[Reduction], trace: TokenTrace) -> None:
        """Insert the reductions, given in block order, and make every edit of the trace, in graph order."""
        place = {node: i for i, node in enumerate(self.graph.nodes)}
        streams = dict.fromkeys(reduction.block.residual for reduction in reductions)
        work = [(place[edit.node], partial(self._edit, edit, trace)) for edit in trace.edits]
        work += [
            (place[s], partial(self._insert, [r for r in reductions if r.block.residual is s]))
            for s in streams
        ]
        for _, act in sorted(work, key=operator.itemgetter(0)):
            act()

    def _insert(self, reductions: list[Reduction]) -> None:
        """Reductions in a row after one block; the second sees the queries and keys of the tokens left."""
        block = reductions[0].block
        site, stream = block.site, block.residual
        flipped = block.token_axis == 0
        padding = padding_mask(site.mask)
        self.padded |= padding is not None
        query, key, after, users = site.query, site.key, stream.next, list(stream.users)
        mask = argument(site.node, 3, "attn_mask")  # as repaired for the reductions before this block
        scale = argument(site.node, 6, "scale")
        Shapes.attached(self.module).refresh(self.module, until=after)
        with self.graph.inserting_before(after):
            bias = self._call(_first_query_bias, mask, stream, flipped, like=stream)
            for reduction in reductions:
                previous = self.stages[-1] if self.stages else None
                size = previous.size if previous else self._first_size(site, padding, stream, flipped)
                arguments = (self._now(stream), query, key, bias, size, scale, padding is not None, flipped)
                parts = self._call(_reduction(reduction.reduce), *arguments, like=stream)
                reduced, new_size, keep, drop, dest, query, key, bias = parts
                self._reduced[stream] = reduced
                self.stages.append(self._stage(reduction, previous, (size, new_size, keep, drop, dest)))
        for user in users:
            if not is_call(user, aten.sym_size):
                user.replace_input_with(stream, self._now(stream))

    def _first_size(self, site: Site, padding: Node | None, stream: Node, flipped: bool) -> Node:
        folded = sizes(site.query)[0] // self.batch
        return self._call(_initial_size, stream, padding, flipped, folded, like=stream)

    def _stage(self, reduction: Reduction, previous: Stage | None, nodes: tuple[Node, ...]) -> Stage:
        size, new_size, keep, drop, dest = nodes
        source = self._call(ops.source_map.default, keep, drop, dest, like=size)
        if previous is None:
            return Stage(keep, new_size, source, size, reduction.weighs_attention, not reduction.merges)
        keep = self._call(ops.gather_tokens.default, previous.keep, keep, 1, like=size)
        source = self._call(ops.gather_tokens.default, source, previous.source, 1, like=size)
        proportional = previous.proportional or reduction.weighs_attention
        pruned = previous.pruned or not reduction.merges
        return Stage(keep, new_size, source, previous.original_size, proportional, pruned)

    def _call(self, function: Callable, *args: object, like: Node) -> Any:
        return call(self.graph, function, *args, like=like)

    # --- repairing what is downstream -------------------------------------------------------------------

    def _edit(self, edit: Edit, trace: TokenTrace) -> None:
        Shapes.attached(self.module).refresh(self.module, until=edit.node)
        with self.graph.inserting_before(edit.node):
            if isinstance(edit, Resize):
                self._resize(edit)
            elif isinstance(edit, Side):
                taken = self._take(edit.operand, edit.axes, edit.stage, sizes(edit.node))
                edit.node.replace_input_with(edit.operand, taken)
            elif isinstance(edit, Attend):
                self._attend(edit, trace.labels)
            elif isinstance(edit, Pool):
                self._pool(edit)
            else:
                self._restore(edit)

    def _now(self, node: Node) -> Node:
        """The node that stands where ``node`` stood before reductions were inserted."""
        return self._reduced.get(node, node)

    def _size_of(self, operand: Node, dim: int) -> Node:
        return self._call(aten.sym_size.int, self._now(operand), dim, like=operand)

    def _resize(self, edit: Resize) -> None:
        node = edit.node
        if is_call(node, aten.split_with_sizes):
            dim = argument(node, 2, "dim", 0)
            axis = edit.before.at(dim % len(sizes(edit.operand)))
            assert axis is not None
            first = argument(node, 1, "split_sizes")[0]
            rest = self._call(operator.sub, self._size_of(edit.operand, axis.dim), first, like=node)
            node.update_arg(1, [first, rest])
        elif is_call(node, aten.expand):
            shape = list(argument(node, 1, "size"))
            for axis in edit.after.axes:
                shape[axis.dim] = -1
            node.update_arg(1, shape)
        else:
            shape = self._shape(node, edit)
            node.target = aten.reshape.default
            node.args, node.kwargs = (self._now(edit.operand), shape), {}

    def _shape(self, node: Node, edit: Resize) -> list[Any]:
        """The shape argument of a reshape in which every token count follows the operand."""
        given = (
            argument(node, 1, "size") if is_call(node, aten.view, aten.reshape, aten._unsafe_view) else None
        )
        value = node.meta["val"]
        shape: list[Any] = []
        for dim, size in enumerate(value.shape):
            axis = edit.after.at(dim)
            if axis is not None:
                shape.append(self._token_count(axis, edit))
            elif isinstance(size, int):
                shape.append(size)
            else:
                spelled = given[dim] if given is not None else -1
                shape.append(self._same_axis(edit.operand, size) if spelled == -1 else spelled)
        if sum(isinstance(s, int) and s == -1 for s in shape) > 1:
            raise PassRefused(f"{describe(node)}: two axes of the reshape would have to be inferred")
        return shape

    def _token_count(self, axis: TokenAxis, edit: Resize) -> Node | int:
        before = next(a for a in edit.before.axes if (a.start, a.stop) == (axis.start, axis.stop))
        return self._size_of(edit.operand, before.dim) if axis.plain and before.plain else -1

    def _same_axis(self, operand: Node, size: torch.SymInt) -> Node | int:
        for dim, other in enumerate(operand.meta["val"].shape):
            if same_size(size, other):
                return self._size_of(operand, dim)
        return -1

    def _take(self, side: Node, axes: tuple[TokenAxis, ...], stage: int, consumer: tuple[int, ...]) -> Node:
        """The side tensor with only the kept tokens, aligned to the consumer's rank with batch first."""
        rank = len(consumer)
        shift = rank - len(sizes(side))
        if any(axis.dim + shift == 0 for axis in axes) or consumer[0] % self.batch:
            raise PassRefused(f"{describe(side)}: a per-token side tensor whose first axis is not the batch")
        key = (side, axes, stage, rank)
        if key not in self._sides:
            dims = tuple((axis.dim + shift, axis.start) for axis in axes)
            arguments = (side, self.stages[stage - 1].keep, dims, shift, consumer[0] // self.batch)
            self._sides[key] = self._call(_take_side, *arguments, like=side)
        return self._sides[key]

    def _attend(self, edit: Attend, labels: dict[Node, Label]) -> None:
        node, stage = edit.node, self.stages[edit.stage - 1]
        mask = argument(node, 3, "attn_mask")
        query, key = node.args[:2]
        assert isinstance(query, Node) and isinstance(key, Node)
        if isinstance(mask, Node) and edit.mask_axes:
            grown = len(sizes(mask)) - edit.mask_rank  # where another stream's tokens were taken before
            axes = tuple(replace(axis, dim=axis.dim + grown) for axis in edit.mask_axes)
            mask = self._take(mask, axes, edit.stage, sizes(query))
        label = labels.get(key)
        if label is not None and stage.proportional:
            folded = sizes(query)[0] // self.batch
            start = label.axes[0].start
            biased = (mask, edit.stage, start, folded)
            if biased not in self._masks:
                arguments = (mask, stage.size, start, folded, self._now(query))
                self._masks[biased] = self._call(_sized_mask, *arguments, like=node)
            mask = self._masks[biased]
        if len(node.args) > 3:
            node.update_arg(3, mask)
        elif mask is not None:
            node.update_kwarg("attn_mask", mask)

    def _pool(self, edit: Pool) -> None:
        node, stage = edit.node, self.stages[edit.stage - 1]
        original = stage.original_size if stage.pruned and not is_call(node, aten.mean) else None
        keepdim = bool(argument(node, 2, "keepdim", False))
        axis = edit.axis
        if axis.dim == 0:
            raise PassRefused(f"{describe(node)}: it pools tokens on the first axis")
        if self.padded and not _is_masked_sum(node):
            raise PassRefused(f"{describe(node)}: it pools padding together with tokens")
        arguments = (self._now(operand_at(node, 0)), stage.size, original, axis.dim, axis.start, keepdim)
        function = _weighted_mean if is_call(node, aten.mean) else _weighted_sum
        pooled = self._call(function, *arguments, like=node)
        pooled.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(pooled)

    def _restore(self, edit: Restore) -> None:
        if any(axis.dim == 0 for axis in edit.axes):
            raise PassRefused(f"{describe(edit.node)}: it needs all tokens on the first axis")
        folded, rest = divmod(sizes(edit.operand)[0], self.batch)
        if rest:
            raise PassRefused(
                f"{describe(edit.node)}: it needs all tokens of what has no batch on the first axis"
            )
        operand = self._now(edit.operand)
        full = operand
        for axis in edit.axes:
            if axis.stop is None:
                source = self.stages[edit.stage - 1].source
                full = self._call(
                    _restore_axis, full, source, axis.dim, axis.start, folded, like=edit.operand
                )
        if edit.node.op == "output":
            outputs = edit.node.args[0]
            assert isinstance(outputs, (tuple, list))
            self.restored += [i for i, output in enumerate(outputs) if output is operand]
        edit.node.replace_input_with(operand, full)


def batch_size(block: Block) -> int:
    """The batch size of a block's residual stream under the example inputs."""
    return sizes(block.residual)[1 - block.tokens_at]


# --- plain functions that the re-export traces -----------------------------------------------------------


def _reduction(reduce: Callable[[Tokens], Assignment]) -> Callable:
    """Wrap a reduction: unfold heads from the batch and bring tokens to axis 1."""

    def step(stream, query, key, bias, size, scale, padded, flipped):
        x = stream.transpose(0, 1) if flipped else stream
        query, key = (t.reshape(x.shape[0], -1, t.shape[-2], t.shape[-1]) for t in (query, key))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        done = reduce(Tokens(x, query, key, size, scale, padded, bias))
        reduced = done.stream.transpose(0, 1) if flipped else done.stream
        # For another reduction in a row; dead code otherwise.
        query, key = (ops.gather_tokens(t, done.keep, 2) for t in (query, key))
        bias = None if bias is None else ops.gather_tokens(bias, done.keep, 3)
        return reduced, done.size, done.keep, done.drop, done.dest, query, key, bias

    return step


def _first_query_bias(mask: Tensor | None, stream: Tensor, flipped: bool) -> Tensor | None:
    """[batch or 1, heads or 1, 1, tokens]: what an attention mask adds to the logits of the first query."""
    if mask is None:
        return None
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    row = mask[:, :, :1]
    if row.dtype == torch.bool:
        row = torch.where(row, 0.0, torch.finfo(stream.dtype).min)
    folded = row.shape[0] // stream.shape[1 if flipped else 0] if row.shape[0] != 1 else 1
    return row.reshape(-1, folded, 1, row.shape[-1]) if folded != 1 else row


def _is_masked_sum(node: Node) -> bool:
    """Whether ``node`` sums a product with a mask, so that padding adds nothing."""
    product = node.args[0]
    if not is_call(node, aten.sum) or not is_call(product, aten.mul):
        return False
    return any(_is_mask(operand) for operand in product.all_input_nodes)


def _is_mask(node: Node) -> bool:
    """Whether a factor comes from an input without passing through the model."""
    return not is_content(node) and any(n.op == "placeholder" for n in {node, *ancestors(node)})


def padding_mask(mask: Node | None) -> Node | None:
    """The mask if it can mark padding: it depends on an input, not on sizes and parameters alone."""
    if mask is None or not any(n.op == "placeholder" for n in {mask, *ancestors(mask)}):
        return None
    return mask


def _initial_size(stream: Tensor, mask: Tensor | None, flipped: bool, folded: int) -> Tensor:
    """[batch, tokens]: 1 for a real token, 0 for padding, a key that no query may see."""
    batch, tokens = (stream.shape[1], stream.shape[0]) if flipped else stream.shape[:2]
    if mask is None:
        return torch.ones(batch, tokens, device=stream.device)
    seen = (mask if mask.dtype == torch.bool else mask > HIDDEN).any(dim=-2)
    while seen.dim() > 2:
        seen = seen.any(dim=1)
    if folded > 1:
        seen = seen.reshape(batch, folded, tokens).any(dim=1)
    return seen.float().expand(batch, tokens)


def _take_side(
    side: Tensor, keep: Tensor, dims: tuple[tuple[int, int], ...], pad: int, folded: int
) -> Tensor:
    for _ in range(pad):
        side = side.unsqueeze(0)
    keep = keep.repeat_interleave(folded, 0) if folded > 1 else keep
    for dim, start in dims:
        side = ops.gather_tokens(side, keep[:, start:] - start if start else keep, dim)
    return side


def _sized_mask(mask: Tensor | None, size: Tensor, start: int, folded: int, query: Tensor) -> Tensor:
    """The attention mask plus ``log(size)`` of every key."""
    bias = ops.log_size(size[:, start:] if start else size).to(query.dtype)
    bias = bias.repeat_interleave(folded, 0) if folded > 1 else bias
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias


def _column(weight: Tensor, x: Tensor, dim: int) -> Tensor:
    """[batch, tokens] shaped to broadcast over ``x`` with tokens at ``dim`` and the batch at 0."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = weight.shape[0], weight.shape[1]
    return weight.reshape(shape).to(x.dtype)


def _weighted_mean(
    x: Tensor, size: Tensor, original: Tensor | None, dim: int, start: int, keepdim: bool
) -> Tensor:
    """Mean over the original tokens: every token counts as many times as it stands for."""
    weight = _column(size[:, start:], x, dim)
    return (x * weight).sum(dim, keepdim) / weight.sum(dim, keepdim)


def _weighted_sum(
    x: Tensor, size: Tensor, original: Tensor | None, dim: int, start: int, keepdim: bool
) -> Tensor:
    """Sum over the original tokens; pruned ones (``original`` given) are replaced by the mean of the kept."""
    weight = size[:, start:]
    if original is not None:
        weight = weight * (original[:, start:].sum(1, keepdim=True) / weight.sum(1, keepdim=True))
    return (x * _column(weight, x, dim)).sum(dim, keepdim)


def _restore_axis(x: Tensor, source: Tensor, dim: int, start: int, folded: int) -> Tensor:
    source = source.repeat_interleave(folded, 0) if folded > 1 else source
    return ops.gather_tokens(x, source[:, start:] - start if start else source, dim)
