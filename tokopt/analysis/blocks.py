"""Attention sites and transformer blocks of a captured graph.

A *site* is one attention. A *block* is a self-attention site together with the add that returns its output
to the residual stream; reductions are inserted after that add, between attention and MLP.
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

_WEIGHTED = (aten.linear, aten.addmm, aten.mm, aten.convolution, aten.conv1d, aten.conv2d)


@dataclass(frozen=True)
class Site:
    """One attention: queries ``[batch, heads, query tokens, channels]`` against keys and values.

    ``self``: queries and keys are projected from the same tensor. ``pooling``: the queries come from
    parameters (a probe). ``cross``: anything else.
    """

    node: Node
    kind: Kind
    query: Node
    key: Node
    value: Node
    mask: Node | None
    causal: bool

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
    """A self-attention site, the residual stream before it and the add after it.

    ``token_axis`` is the token axis of both; ``path`` the module that holds the block.
    """

    index: int
    site: Site
    stream: Node
    residual: Node
    token_axis: int
    style: Style


@dataclass(frozen=True)
class NoBlock:
    """A site that is not a block that tokens could be reduced in, and the reason."""

    site: Site
    reason: str


def find_sites(graph: Graph) -> list[Site]:
    """Every attention of the graph, classified, in execution order."""
    return [_site(node) for node in attention_nodes(graph)]


def find_blocks(graph: Graph) -> list[Block | NoBlock]:
    """A Block per self-attention with a residual add, a NoBlock with its reason for every other site."""
    found: list[Block | NoBlock] = []
    for site in find_sites(graph):
        index = sum(isinstance(b, Block) for b in found)
        found.append(_block(site, index))
    return found


def _site(node: Node) -> Site:
    query, key, value = node.args[:3]
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    mask = argument(node, 3, "attn_mask")
    causal = bool(argument(node, 5, "is_causal", False))
    return Site(node, _kind(query, key), query, key, value, mask if isinstance(mask, Node) else None, causal)


def _kind(query: Node, key: Node) -> Kind:
    if is_call(key, ops.cache_write):
        return "self"  # over the new tokens and those before them
    from_query, from_key = _projected_from(query), _projected_from(key)
    if from_query & from_key or _unwrap(query) is _unwrap(key):
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


def _block(site: Site, index: int) -> Block | NoBlock:
    if site.kind == "pooling":
        return NoBlock(site, "pooling attention: its output is not per token")
    if is_call(site.key, ops.cache_write):
        return NoBlock(site, "its keys and values are in a cache, which the eviction passes bound")
    if site.kind == "cross":
        return NoBlock(site, "cross attention: queries and keys are different tokens")
    if site.causal:
        return NoBlock(site, "causal attention: reducing tokens would let later tokens reach earlier ones")
    add = _residual_add(site)
    if isinstance(add, str):
        return NoBlock(site, add)
    axis = _token_axis(add, site)
    if axis is None:
        return NoBlock(site, "the residual stream has no single axis of the attention's token count")
    stream = next(n for n in tensor_inputs(add) if n in ancestors(site.node))
    end, parallel = _past_parallel_branch(add, site)
    return Block(index, site, stream, end, axis, "parallel" if parallel else _style(site, stream))


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
