"""Attention sites and transformer blocks of a captured graph.

A *site* is one attention. A *block* is a self-attention site together with what returns to the residual stream: from
the stream that the attention's branch reads to the stream that the next block's reads. Encoders and decoders have
them alike; what may be done to a block says the pass that does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.fx import Graph, Node

from tokopt.ir.graph import (
    ancestors,
    argument,
    aten,
    attention_nodes,
    is_call,
    is_tensor,
    module_path,
    operand_at,
    reaches,
    same_size,
    size_hint,
    tensor_inputs,
    value_users,
)
from tokopt.kernels import declared, ops

Kind = Literal["self", "cross", "pooling"]
Style = Literal["pre-norm", "post-norm", "parallel"]

_WRAPPERS = (
    *(aten.dropout, aten.clone, aten.contiguous, aten.to, aten._to_copy),
    *(aten.view, aten.reshape, aten.transpose, aten.permute),
)

_NORMS = (aten.layer_norm, aten.rms_norm)

_WEIGHTED = (aten.linear, aten.addmm, aten.mm, aten.convolution, aten.conv1d, aten.conv2d)


@dataclass(frozen=True)
class Site:
    """One attention: queries ``[batch, heads, query tokens, channels]`` against keys and values.

    ``self``: queries and keys are projected from the same tensor. ``pooling``: the queries come from
    parameters (a probe). ``cross``: anything else. ``cached``: keys and values of earlier calls are among them.
    """

    node: Node
    kind: Kind
    query: Node
    key: Node
    value: Node
    mask: Node | None
    causal: bool
    cached: bool = False

    @property
    def path(self) -> str:
        """Module path of the attention in the user's model."""
        return module_path(self.node)

    @property
    def tokens(self) -> int:
        """Number of key tokens under the example inputs."""
        return size_hint(self.key.meta["val"].shape[-2])

    @property
    def heads(self) -> int:
        """Number of query heads under the example inputs (1 when heads are folded into the batch)."""
        return size_hint(self.query.meta["val"].shape[1])


@dataclass(frozen=True)
class Block:
    """A self-attention site, and the residual stream around it.

    ``stream`` is what the attention's branch reads, ``residual`` the add that returns its output, and ``end`` the
    stream after the block's last branch, an MLP mostly: what the next block reads, or what stands between the two.
    ``token_axis`` is the token axis of all three where they have a single one, [batch, tokens, channels] or
    [tokens, batch, channels].
    """

    index: int
    site: Site
    stream: Node
    residual: Node
    end: Node
    token_axis: int | None
    style: Style

    @property
    def tokens_at(self) -> int:
        """The token axis of a block that has a single one."""
        assert self.token_axis is not None, f"block {self.index} has no single token axis"
        return self.token_axis

    @property
    def reads(self) -> tuple[Node, ...]:
        """What a reduction in the block looks at."""
        mask = () if self.site.mask is None else (self.site.mask,)
        return (self.stream, self.residual, self.site.query, self.site.key, *mask)

    @property
    def label(self) -> str:
        """How notes and refusals name the block: ``block 3 (encoder.layer.3.attention)``."""
        return f"block {self.index}" + (f" ({self.site.path})" if self.site.path else "")


@dataclass(frozen=True)
class NoBlock:
    """A site that is no block, and the reason."""

    site: Site
    reason: str


def find_sites(graph: Graph) -> list[Site]:
    """Every attention of the graph, classified, in execution order."""
    return [_site(node) for node in attention_nodes(graph)]


def find_blocks(graph: Graph) -> list[Block | NoBlock]:
    """A Block per self-attention with a residual add, a NoBlock with its reason for every other site."""
    found: list[Block | NoBlock] = []
    sites = find_sites(graph)
    attentions = {site.node for site in sites if site.kind == "self"}
    for site in sites:
        index = sum(isinstance(b, Block) for b in found)
        found.append(_block(site, index, attentions))
    return found


def blocks_of(graph: Graph) -> list[Block]:
    """The blocks of a graph, in execution order."""
    return [found for found in find_blocks(graph) if isinstance(found, Block)]


def _site(node: Node) -> Site:
    query, key, value = node.args[:3]
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    mask = argument(node, 3, "attn_mask")
    causal = bool(argument(node, 5, "is_causal", False))
    mask, cached = mask if isinstance(mask, Node) else None, _is_cached(key)
    return Site(node, _kind(query, key, cached), query, key, value, mask, causal, cached)


def _is_cached(key: Node) -> bool:
    """Whether keys were written into a cache, perhaps as integers, after they were projected."""
    stack, seen = [key], {key}
    while stack:
        current = stack.pop()
        if is_call(current, ops.cache_write):
            return True
        if is_call(current, *_WEIGHTED):
            continue
        above = [operand for operand in tensor_inputs(current) if operand not in seen]
        seen.update(above)
        stack += above
    return False


def _kind(query: Node, key: Node, cached: bool) -> Kind:
    from_query, from_key = _projected_from(query), _projected_from(key)
    if from_query & from_key or _unwrap(query) is _unwrap(key):
        if cached:
            return "self"  # over the new tokens and those before them
        same = same_size(query.meta["val"].shape[-2], key.meta["val"].shape[-2])
        return "self" if same else "cross"
    inputs = [n for n in {query, *ancestors(query)} if n.op == "placeholder"]
    return "cross" if inputs else "pooling"


def _projected_from(node: Node) -> set[Node]:
    """The tensors that the nearest weighted layers above ``node`` read."""
    found: set[Node] = set()
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if is_call(current, *_WEIGHTED):
            found.add(operand_at(current, 1 if is_call(current, aten.addmm) else 0))
            continue
        for operand in tensor_inputs(current):
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    # Identity wrappers between the shared tensor and the projections do not make it another tensor.
    return {_unwrap(n) for n in found}


def _unwrap(node: Node) -> Node:
    """Past what leaves a tensor's values as they are, or rounds them for one product."""
    while True:
        op = declared(node.target)
        rounded = op is not None and op.rounds and op.elementwise
        if rounded or is_call(node, *_WRAPPERS):
            node = operand_at(node, 0)
            if rounded and is_call(node, aten.div):
                node = operand_at(node, 0)
        else:
            return node


def _block(site: Site, index: int, attentions: set[Node]) -> Block | NoBlock:
    if site.kind == "pooling":
        return NoBlock(site, "pooling attention: its output is not per token")
    if site.kind == "cross":
        return NoBlock(site, "cross attention: queries and keys are different tokens")
    add = _residual_add(site)
    if isinstance(add, str):
        return NoBlock(site, add)
    stream = next(n for n in tensor_inputs(add) if n in ancestors(site.node))
    residual, parallel = _past_parallel_branch(add, site)
    style = "parallel" if parallel else _style(site, stream)
    end = _end(residual, style, attentions)
    return Block(index, site, stream, residual, end, _token_axis(add, site), style)


def _end(residual: Node, style: Style, attentions: set[Node]) -> Node:
    """The stream after every branch that leaves ``residual`` and returns before the next self-attention.

    A norm that all readers read belongs to the block where it stands between two branches, and after the last one of a
    post-norm block.
    """
    end = stream = residual
    while True:
        normed = _only_reader(stream)
        between = normed is not None and is_call(normed, *_NORMS)
        start = normed if between and normed is not None else stream
        back = _returning_add(start, attentions)
        if back is None:
            return start if between and style == "post-norm" else end
        stream, end = back, _in_shape_of(back, residual)


def _only_reader(node: Node) -> Node | None:
    """The one node that reads a value."""
    users = value_users(node)
    return users[0] if len(users) == 1 else None


def _returning_add(stream: Node, attentions: set[Node]) -> Node | None:
    """The add of ``stream``, or of a view of it, and a branch that reads it, without a self-attention on the way."""
    node = stream
    while (only := _only_reader(node)) is not None and is_call(only, *_WRAPPERS):
        node = only
    add = _meeting(node)
    if add is None or not is_call(add, aten.add) or add.kwargs or node not in add.args[:2]:
        return None
    branch = _other_operand(add, node)
    inside = reaches(node)
    if (
        branch not in inside
        or not _same_shape(branch, add)
        or not attentions.isdisjoint(inside & ancestors(add))
    ):
        return None
    return add


def _in_shape_of(node: Node, stream: Node) -> Node:
    """``node``, or the view of it in the shape of ``stream`` that alone is read."""
    found: Node | None = node
    while found is not None and not _same_shape(found, stream):
        found = _only_reader(found)
        if not is_call(found, *_WRAPPERS):
            return node
    return node if found is None else found


def _residual_add(site: Site) -> Node | str:
    """The add that returns the attention's output to the residual stream, or why there is none."""
    upstream = ancestors(site.node)
    current = site.node
    while True:
        following = _meeting(current)
        if following is None:
            several = len(value_users(current)) > 1
            how = "is used in several places" if several else "leaves the model"
            return f"no residual add found: the attention's output {how}"
        if is_call(following, aten.add) and not following.kwargs:
            other = _other_operand(following, current)
            if other in upstream and _same_shape(other, following):
                return following
        if not is_tensor(following):
            return f"no residual add found: the attention's output goes into {following.target}"
        current = following


def _meeting(node: Node) -> Node | None:
    """The first node that everything made of ``node`` goes through, or None where some of it leaves the model."""
    open_ = set(value_users(node))
    for following in node.graph.nodes:
        if following not in open_:
            continue
        if following.op == "output":
            return None
        if open_ == {following}:
            return following
        open_.remove(following)
        open_.update(value_users(following))
    return None


def _other_operand(add: Node, operand: Node) -> Node | None:
    others = [a for a in add.args[:2] if isinstance(a, Node) and a is not operand]
    return others[0] if others else None


def _same_shape(a: Node | None, b: Node) -> bool:
    return a is not None and str(a.meta["val"].shape) == str(b.meta["val"].shape)


def _token_axis(add: Node, site: Site) -> int | None:
    """The axis (0 or 1) of ``[batch, tokens, channels]`` or ``[tokens, batch, channels]`` that counts tokens."""
    shape = add.meta["val"].shape
    if len(shape) != 3:
        return None
    matching = [i for i in (0, 1) if same_size(shape[i], site.query.meta["val"].shape[-2])]
    return matching[0] if len(matching) == 1 else None


def _past_parallel_branch(add: Node, site: Site) -> tuple[Node, bool]:
    """Step over ``x + attention(x) + mlp(x)``: the block ends after the last add of the same input."""
    parallel = False
    while True:
        users = value_users(add)
        if len(users) != 1 or not is_call(users[0], aten.add):
            return add, parallel
        other = _other_operand(users[0], add)
        if other is None or other.op == "get_attr" or not _same_shape(other, add) or other in reaches(add):
            return add, parallel
        if not (ancestors(other) & ancestors(site.node)):
            return add, parallel
        add, parallel = users[0], True


def _style(site: Site, stream: Node) -> Style:
    """Post-norm when the projections read the residual stream itself."""
    return "post-norm" if _unwrap(stream) in _projected_from(site.query) else "pre-norm"
