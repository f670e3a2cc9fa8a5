"""Normalisation at capture, so that every pass sees one form of attention.

1. A mask that hides nothing (all True or all zero, proved for every size allowed) is dropped.
2. Keys of one head, which the heads of queries broadcast, are said to be shared (``enable_gqa``).
3. ``softmax(scale * q @ k.T + bias) @ v`` becomes ``scaled_dot_product_attention``: hand-written attention,
   ``attn_implementation="eager"`` and ``nn.MultiheadAttention`` end up like everything else.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from tokopt.analysis.bounds import bounds
from tokopt.analysis.constants import evaluate, parameter
from tokopt.errors import CaptureError
from tokopt.ir.graph import (
    ancestors,
    argument,
    aten,
    attention_nodes,
    is_call,
    is_tensor,
    operand_at,
    value_users,
)
from tokopt.ir.program import Program
from tokopt.kernels import ops
from tokopt.rewrite.edit import call, close_graph, open_graph, put_parameter

_NO_OPS = (aten.dropout, aten.clone, aten.contiguous, aten.alias, aten.detach)
_UNKNOWN = (aten.erfinv, aten.special_erfinv, aten.special_ndtri, aten.upsample_bicubic2d)
_HIDDEN = -1e4  # additive masks at or below this hide a key


def normalize(program: Program) -> Program:
    """The normalised Program; the same object when nothing had to change.

    Raises CaptureError when the rewritten graph does not reproduce the model on the example inputs.
    """
    module = open_graph(program)
    steps = (
        _drop_casts,
        _fold_constants,
        _fuse_softmax_chains,
        _share_key,
        _hide_by_booleans,
        _drop_empty_masks,
    )
    changed = [step(module) for step in steps]
    if not any(changed):
        return program
    normalized = close_graph(program, module)
    for spec, got, wanted in zip(
        program.outputs, normalized(*program.example), program(*program.example), strict=True
    ):
        if not torch.allclose(got.double(), wanted.double(), rtol=1e-3, atol=1e-4, equal_nan=True):
            raise CaptureError(
                f"rewriting attention changed the output {spec.name!r}; please report this model"
            )
    return normalized


def _hide_by_booleans(module: GraphModule) -> bool:
    """Give attention the mask of a cache itself, where it is given numbers that hide what the mask hides."""
    changed = False
    for node in attention_nodes(module.graph):
        mask = argument(node, 3, "attn_mask")
        if not (isinstance(mask, Node) and is_call(mask, aten.where)):
            continue
        seen, shown, hidden = mask.args
        if is_call(seen, ops.cache_mask) and shown == 0 and isinstance(hidden, float) and hidden <= _HIDDEN:
            node.replace_input_with(mask, operand_at(mask, 0))
            changed = True
    if changed:
        module.graph.eliminate_dead_code()
    return changed


def _drop_casts(module: GraphModule) -> bool:
    """Take away casts to the dtype that a value has: eager mode gives the value itself."""
    found = [
        node
        for node in module.graph.nodes
        if is_call(node, aten.to.dtype) and node.meta["val"].dtype == operand_at(node, 0).meta["val"].dtype
    ]
    for node in found:
        node.replace_all_uses_with(operand_at(node, 0))
        module.graph.erase_node(node)
    return bool(found)


def _fold_constants(module: GraphModule) -> bool:
    """Compute what no engine can, or not in every layout, where it is computed of constants alone."""
    found = [node for node in module.graph.nodes if is_call(node, *_UNKNOWN)]
    fixed = [node for node in found if all(n.op != "placeholder" for n in ancestors(node))]
    for node in fixed:
        value = evaluate(module, node, {})
        node.replace_all_uses_with(put_parameter(module, node, None, value))
    if fixed:
        module.graph.eliminate_dead_code()
    return bool(fixed)


def _share_key(module: GraphModule) -> bool:
    """Say of keys of one head, which all heads of queries broadcast, that the heads share them."""
    changed = False
    for node in attention_nodes(module.graph):
        query, key = (operand_at(node, i).meta["val"] for i in (0, 1))
        if (
            query.dim() == 4
            and key.shape[1] == 1 != query.shape[1]
            and not argument(node, 7, "enable_gqa", False)
        ):
            node.update_kwarg("enable_gqa", True)
            changed = True
    return changed


# --- masks that hide nothing ----------------------------------------------------------------------------


def _drop_empty_masks(module: GraphModule) -> bool:
    changed = False
    for node in attention_nodes(module.graph):
        mask = argument(node, 3, "attn_mask")
        if isinstance(mask, Node) and _hides_nothing(module, mask):
            if len(node.args) > 3:
                node.update_arg(3, None)
            else:
                node.update_kwarg("attn_mask", None)
            changed = True
    return changed


def _hides_nothing(module: GraphModule, mask: Node) -> bool:
    """Whether the mask is proved to be neutral at every size allowed."""
    if any(n.op == "get_attr" and parameter(module, n).is_floating_point() for n in {mask, *ancestors(mask)}):
        return False  # a bias that may be trained to be another one
    found = bounds(module, mask)
    neutral = (1, 1) if mask.meta["val"].dtype == torch.bool else (0, 0)
    return found is not None and (found.low, found.high) == neutral


# --- softmax chains -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bias:
    """What is added to the logits: ``factor * node``, or a large negative number where ``node`` hides a key."""

    node: Node
    factor: float = 1.0
    hides: bool = False


@dataclass(frozen=True)
class _Chain:
    """An explicit attention: ``output = softmax(scale * query @ key_t + sum(biases)) @ value``."""

    query: Node
    key_t: Node
    value: Node
    output: Node
    scale: float
    biases: list[_Bias]


def _fuse_softmax_chains(module: GraphModule) -> bool:
    chains = [chain for node in module.graph.nodes if (chain := _match_chain(node)) is not None]
    for chain in chains:
        with module.graph.inserting_before(chain.output):
            bias = _insert_bias(module, chain)
            key, turned = _untransposed(chain.key_t)
            operands = (chain.query, key, chain.value, bias, chain.scale, turned)
            fused = call(module.graph, _attention, *operands, like=chain.output)
            fused.meta["val"] = chain.output.meta["val"]
        chain.output.replace_all_uses_with(fused)
    module.graph.eliminate_dead_code()
    return bool(chains)


def _untransposed(key_t: Node) -> tuple[Node, bool]:
    """The keys that were transposed, and whether they still have to be turned back."""
    last = (key_t.meta["val"].dim() - 2, key_t.meta["val"].dim() - 1)
    if is_call(key_t, aten.transpose.int):
        axes = sorted(axis % key_t.meta["val"].dim() for axis in key_t.args[1:])  # type: ignore[operator]
        if tuple(axes) == last:
            return operand_at(key_t, 0), False
    return key_t, True


def _insert_bias(module: GraphModule, chain: _Chain) -> Node | None:
    if not chain.biases:
        return None
    forms = tuple((bias.factor, bias.hides) for bias in chain.biases)
    dtype = chain.output.meta["val"].dtype
    return call(module.graph, _sum_biases, forms, dtype, *[b.node for b in chain.biases], like=chain.output)


def _sum_biases(
    forms: tuple[tuple[float, bool], ...], dtype: torch.dtype, *biases: torch.Tensor
) -> torch.Tensor:
    terms = []
    for (factor, hides), bias in zip(forms, biases, strict=True):
        if hides:
            terms.append(torch.zeros_like(bias, dtype=dtype).masked_fill(bias, torch.finfo(dtype).min))
        else:
            terms.append(bias if factor == 1.0 else bias * factor)
    return functools.reduce(operator.add, terms)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    turned: bool,
) -> torch.Tensor:
    """SDPA on ``[..., tokens, channels]``; three axes (batch x heads in one) gain a head axis for the call.

    Keys that are ``turned`` are [..., channels, tokens].
    """
    key = key.transpose(-1, -2) if turned else key
    flat = query.dim() == 3
    if flat:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        bias = bias.unsqueeze(1) if bias is not None and bias.dim() == 3 else bias
    if bias is not None:
        bias = bias.to(query.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return out.squeeze(1) if flat else out


def _match_chain(node: Node) -> _Chain | None:
    if not is_call(node, aten.softmax, aten._softmax) or argument(node, 1, "dim") not in (
        -1,
        node.meta["val"].dim() - 1,
    ):
        return None
    product = _only_user_past_no_ops(node)
    if (
        product is None
        or not is_call(product, aten.matmul, aten.bmm)
        or not _is_or_passes(product.args[0], node)
    ):
        return None
    logits = node.args[0]
    scale, biases = 1.0, list[_Bias]()
    while isinstance(logits, Node) and len(value_users(logits)) == 1:
        if is_call(logits, aten.matmul, aten.bmm):
            query, key_t = logits.args[:2]
            return _chain(query, key_t, product, scale, biases)
        if is_call(logits, aten.baddbmm):
            bias, query, key_t = logits.args[:3]
            beta, alpha = float(argument(logits, 3, "beta", 1)), float(argument(logits, 4, "alpha", 1))
            if beta and is_tensor(bias):
                biases.append(_Bias(bias, scale * beta))
            return _chain(query, key_t, product, scale * alpha, biases)
        step = _step_up(logits)
        if step is None:
            return None
        logits, factor, bias = step
        if bias is not None:
            biases.append(replace(bias, factor=bias.factor * scale))
        scale *= factor
    return None


def _chain(query: object, key_t: object, product: Node, scale: float, biases: list) -> _Chain | None:
    value = product.args[1]
    if not (is_tensor(query) and is_tensor(key_t) and is_tensor(value)):
        return None
    ranks = {n.meta["val"].dim() for n in (query, key_t, value)}
    if ranks not in ({3}, {4}):
        return None
    return _Chain(query, key_t, value, product, scale, biases)


def _step_up(logits: Node) -> tuple[Node, float, _Bias | None] | None:
    """One operation before the softmax: the operand it works on, its scale factor, the bias it adds."""
    if is_call(logits, *_NO_OPS):
        return operand_at(logits, 0), 1.0, None
    if is_call(logits, aten.mul, aten.div) and isinstance(logits.args[1], (int, float)):
        factor = float(logits.args[1])
        return operand_at(logits, 0), factor if is_call(logits, aten.mul) else 1 / factor, None
    if is_call(logits, aten.add) and not logits.kwargs and all(is_tensor(a) for a in logits.args):
        a, b = operand_at(logits, 0), operand_at(logits, 1)
        if _leads_to_product(a):
            return a, 1.0, _Bias(b)
        if _leads_to_product(b):
            return b, 1.0, _Bias(a)
    if (
        is_call(logits, aten.masked_fill)
        and isinstance(logits.args[2], (int, float))
        and logits.args[2] <= _HIDDEN
    ):
        return operand_at(logits, 0), 1.0, _Bias(operand_at(logits, 1), hides=True)
    return None


def _leads_to_product(node: object) -> bool:
    """Whether this operand of an add is the logits rather than the bias."""
    while isinstance(node, Node) and len(value_users(node)) == 1:
        if is_call(node, aten.matmul, aten.bmm, aten.baddbmm):
            return True
        if not is_call(node, aten.mul, aten.div, aten.add, aten.masked_fill, *_NO_OPS):
            return False
        node = node.args[0]
    return False


def _only_user_past_no_ops(node: Node) -> Node | None:
    users = value_users(node)
    while len(users) == 1 and is_call(users[0], *_NO_OPS):
        users = value_users(users[0])
    return users[0] if len(users) == 1 else None


def _is_or_passes(node: object, target: Node) -> bool:
    while isinstance(node, Node) and node is not target and is_call(node, *_NO_OPS):
        node = node.args[0]
    return node is target
