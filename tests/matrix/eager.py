"""Token reduction by hand: an eager reference that shares no code with the passes and kernels.

:func:`run_eager` runs a zoo model with its blocks replaced by copies that say where the reduction happens,
and with ``scaled_dot_product_attention`` replaced by one that keeps the keys and attention weights, gathers
masks by the tokens that are left, and adds ``log(size)`` to the logits. Selection is written with Python
loops over tokens, in float64, from the formulas of the papers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tests.zoo import ZOO

Block = Callable[..., Any]


# ------------------------------------------------------------------------------- selection, one row each


@dataclass(frozen=True)
class Plan:
    """What becomes of the tokens of one row: ``groups`` in the new order, each a list of old indices.

    The first index of a group is its representative: side tensors (masks, positions) follow it. ``dropped``
    tokens are in no group. ``weights`` replaces the size-weighted mean of a group by a plain weighted sum,
    which counts as one token.
    """

    groups: list[list[int]]
    dropped: list[int] = field(default_factory=list)
    weights: dict[int, list[float]] = field(default_factory=dict)


def cosine(a: Tensor, b: Tensor) -> float:
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length > 0 else 0.0


def best(candidates: Sequence[int], score: Callable[[int], float]) -> int:
    """The candidate of highest score, the first of equals."""
    return max(candidates, key=lambda i: (score(i), -candidates.index(i)))


def best_pairs(
    metric: Tensor, size: Tensor, r: int, prefix: int, a_side: list[int], b_side: list[int]
) -> Plan:
    """Give each a its most similar b, merge the r best pairs."""
    partner, score = {}, {}
    for a in a_side:
        alike = [b for b in b_side if (size[b] == 0) == (size[a] == 0)] or b_side
        partner[a] = best(alike, lambda b, a=a: cosine(metric[a], metric[b]))
        score[a] = math.inf if size[a] == 0 else cosine(metric[a], metric[partner[a]])
    merged = sorted(a_side, key=lambda a: -score[a])[:r]
    absorbed = {b: [a for a in merged if partner[a] == b] for b in b_side}
    alone = [[i] for i in range(prefix)] + [[a] for a in a_side if a not in merged]
    return Plan(alone + [[b, *absorbed[b]] for b in b_side])


def tome(metric: Tensor, size: Tensor, r: int, prefix: int, **_: Any) -> Plan:
    """Split by parity into A and B."""
    free = range(prefix, len(size))
    return best_pairs(metric, size, r, prefix, [i for i in free if i % 2 == 0], [i for i in free if i % 2])


def by_energy(metric: Tensor, size: Tensor, prefix: int, margin: float) -> list[int]:
    """Tokens ranked by energy, the mean of ELU(cosine - margin); padding first."""
    free = list(range(prefix, len(size)))
    real = [i for i in free if size[i] > 0]

    def energy(i: int) -> float:
        if size[i] == 0:
            return math.inf
        shifted = [cosine(metric[i], metric[j]) - margin for j in real]
        return sum(s if s > 0 else math.expm1(s) for s in shifted) / len(real)

    energies = {i: energy(i) for i in free}
    return sorted(free, key=lambda i: (-energies[i], i))


def pitome(metric: Tensor, size: Tensor, r: int, prefix: int, margin: float = 0.75, **_: Any) -> Plan:
    """Algorithm 1: of the 2 r tokens of highest energy, even ranks merge into odd ranks."""
    ranked = by_energy(metric, size, prefix, margin)
    a_side, b_side, rest = ranked[: 2 * r : 2], ranked[1 : 2 * r : 2], sorted(ranked[2 * r :])
    absorbed: dict[int, list[int]] = {b: [] for b in b_side}
    for a in a_side:
        alike = [b for b in b_side if (size[b] == 0) == (size[a] == 0)] or b_side
        absorbed[best(alike, lambda b, a=a: cosine(metric[a], metric[b]))].append(a)
    return Plan([[i] for i in (*range(prefix), *rest)] + [[b, *absorbed[b]] for b in b_side])


def pitome_bipartite(
    metric: Tensor, size: Tensor, r: int, prefix: int, margin: float = 0.75, **_: Any
) -> Plan:
    """Split by the parity of the energy's rank into A and B."""
    ranked = by_energy(metric, size, prefix, margin)
    return best_pairs(metric, size, r, prefix, ranked[::2], ranked[1::2])


def pitome_deit(depth: float, **facts: Any) -> Plan:
    """The bipartite matching in the first half of the blocks, Algorithm 1 in the last."""
    return pitome_bipartite(**facts) if depth < 0.5 else pitome(**facts)


def pitome_mae(depth: float, **facts: Any) -> Plan:
    """The other way round."""
    return pitome(**facts) if depth < 0.5 else pitome_bipartite(**facts)


def by_score(score: Tensor, size: Tensor, r: int, prefix: int) -> Plan:
    """Keep the tokens of highest score, in score order; padding goes first."""
    value = {i: float(score[i]) if size[i] > 0 else -math.inf for i in range(prefix, len(size))}
    ranked = sorted(value, key=lambda i: (-value[i], i))
    kept = len(ranked) - r
    return Plan([[i] for i in (*range(prefix), *ranked[:kept])], ranked[kept:])


def evit(size: Tensor, r: int, prefix: int, score: Tensor, **_: Any) -> Plan:
    """Keep what the class token attends to most."""
    return by_score(score, size, r, prefix)


def evit_fused(size: Tensor, r: int, prefix: int, score: Tensor, **_: Any) -> Plan:
    """As :func:`evit`, one token fewer kept, and the dropped ones fused into one by their attention."""
    plan = by_score(score, size, r + 1, prefix)
    weights = [float(score[i]) for i in plan.dropped]
    return Plan([*plan.groups, plan.dropped], [], {len(plan.groups): weights})


def diverse(features: Tensor, size: Tensor, r: int, prefix: int, distance: Callable, first: str) -> Plan:
    """Greedy farthest-point selection; padding is chosen last."""
    free = list(range(prefix, len(size)))
    real = [i for i in free if size[i] > 0]
    table = {(i, j): distance(features[i], features[j]) for i in real for j in real}
    if first == "isolated":
        chosen = [best(real, lambda i: min((table[i, j] for j in real if j != i), default=math.inf))]
    else:
        centre = torch.stack([features[i] for i in real]).mean(dim=0)
        chosen = [best(real, lambda i: -float((features[i] - centre).norm()))]
    while len(chosen) < min(len(free) - r, len(real)):
        others = [i for i in real if i not in chosen]
        chosen.append(best(others, lambda i: min(table[i, j] for j in chosen)))
    padding = [i for i in free if size[i] == 0]
    kept = sorted(chosen + padding[: len(free) - r - len(chosen)])
    return Plan([[i] for i in (*range(prefix), *kept)], [i for i in free if i not in kept])


def divprune(features: Tensor, size: Tensor, r: int, prefix: int, **_: Any) -> Plan:
    return diverse(features, size, r, prefix, lambda a, b: 1 - cosine(a, b), "isolated")


def kcenter(features: Tensor, size: Tensor, r: int, prefix: int, **_: Any) -> Plan:
    return diverse(features, size, r, prefix, lambda a, b: float((a - b).norm()), "central")


def slot_noise(tokens: int, seed: int) -> Tensor:
    """[tokens] float64: the pseudo-random numbers of the slots, by which ``random`` chooses."""

    def hashed(value: int) -> float:
        for multiplier in (48_271, 69_621, 16_807):
            value = value * multiplier % 1_048_573
            value = (value * value + 12_345) % 1_048_573
        return float(value)

    return torch.tensor([hashed(slot + 1009 * seed + 1) for slot in range(tokens)], dtype=torch.float64)


def random(size: Tensor, r: int, prefix: int, noise: Tensor, **_: Any) -> Plan:
    """Keep the tokens of highest noise."""
    return by_score(noise, size, r, prefix)


METHODS: Mapping[str, Callable[..., Plan]] = {
    "tome": tome,
    "pitome": pitome,
    "pitome_bipartite": pitome_bipartite,
    "pitome_deit": pitome_deit,
    "pitome_mae": pitome_mae,
    "evit": evit,
    "evit_fused": evit_fused,
    "divprune": divprune,
    "kcenter": kcenter,
    "random": random,
}


# ---------------------------------------------------------------------------------------------- state


class Reduction:
    """The tokens that are left, and the reduction between attention and MLP.

    ``size`` [batch, n] counts the original tokens of each slot (0: padding), ``kept`` [batch, n] is the
    original index of each slot's representative, ``source`` [batch, tokens] the slot of each original token.
    """

    def __init__(self, size: Tensor, method: str, r: Sequence[int], options: Mapping[str, Any]) -> None:
        self.size = size.float()
        batch, tokens = size.shape
        self.kept = torch.arange(tokens).repeat(batch, 1)
        self.source = self.kept.clone()
        self.padded = bool((size == 0).any()) or bool(options.get("padded"))
        self.method, self.r, self.options = method, tuple(r), options
        self.prefix: int = options["prefix"]
        self.layer = 0
        self.keys = self.weights = torch.empty(0)

    @property
    def original(self) -> int:
        return self.source.shape[1]

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``scaled_dot_product_attention`` that follows the tokens and remembers what it saw."""
        assert dropout_p == 0 and not is_causal and not enable_gqa
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        logits = query @ key.mT * factor
        if attn_mask is not None:
            logits = logits + self.follow(attn_mask, query.shape[0], logits.shape[-2])
        if self.options.get("proportional", True):
            logits = logits + self.size.log()[:, None, None, :]
        # A row that may see nothing attends to nothing; only padding has such rows.
        weights = logits.softmax(dim=-1).nan_to_num(0.0)
        self.keys, self.weights = key, weights
        return weights @ value

    def follow(self, mask: Tensor, batch: int, queries: int) -> Tensor:
        """The additive mask [batch, heads or 1, queries, n] of the tokens that are left."""
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        rows = []
        for b, kept in enumerate(self.kept):
            row = mask[b if mask.shape[0] == batch > 1 else 0]
            rows.append(row[:, kept][:, :, kept] if row.shape[-2] == self.original else row[:, :, kept])
        assert rows[0].shape[-2] in (1, queries)
        return torch.stack(rows)

    def side(self, table: Tensor, offset: int = 0) -> Tensor:
        """Rows of a per-token table [tokens - offset, ...] for the tokens left: [batch, n - offset, ...].

        ``offset`` leading tokens have no row; they are protected, so they lead in every row of ``kept``.
        """
        return torch.stack([table[kept[offset:] - offset] for kept in self.kept])

    def __call__(self, x: Tensor) -> Tensor:
        """Reduce the residual stream [batch, n, channels] after the attention of the current block."""
        r, self.layer = self.r[self.layer], self.layer + 1
        if r == 0:
            return x
        metric = self.keys.mean(dim=1).double()
        score = self.weights.mean(dim=1)[:, 0].double()
        noise = slot_noise(x.shape[1], self.options.get("seed", 0)).expand_as(score)
        depth = (self.layer - 1) / len(self.r)
        margin = self.options.get("margin", 0.75) * (1 - depth)
        rows = []
        for b, size in enumerate(self.size):
            order = self.real_first(size)
            tensors = {"metric": metric, "score": score, "noise": noise, "features": x.double()}
            facts = {name: value[b][order] for name, value in tensors.items()}
            facts |= {"size": size[order], "margin": margin, "depth": depth}
            plan = METHODS[self.method](r=r, prefix=self.prefix, **facts)
            rows.append(self.apply(b, x[b], order, facts["metric"], plan))
        merged, sizes, kept, sources = (torch.stack(part) for part in zip(*rows, strict=True))
        self.size, self.kept = sizes, kept
        self.source = sources.gather(1, self.source)
        return merged

    def real_first(self, size: Tensor) -> Tensor:
        """The order in which tokens are matched: prefix, real tokens, padding."""
        if not self.padded:
            return torch.arange(len(size))
        real = [i for i in range(self.prefix, len(size)) if size[i] > 0]
        padding = [i for i in range(self.prefix, len(size)) if size[i] == 0]
        return torch.tensor([*range(self.prefix), *real, *padding])

    def apply(
        self, row: int, x: Tensor, order: Tensor, metric: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Merged tokens [n - r, channels], their sizes and representatives, the slot of each old token."""
        source = torch.full((len(order),), -1)
        tokens, sizes, kept = [], [], []
        for slot, group in enumerate(plan.groups):
            members = order[torch.tensor(group)]
            source[members] = slot
            size = self.size[row, members]
            weight = torch.tensor(plan.weights[slot]) if slot in plan.weights else size / size.sum()
            tokens.append((weight.nan_to_num(0.0)[:, None] * x[members]).sum(dim=0))
            sizes.append(size[0] if slot in plan.weights else size.sum())
            kept.append(self.kept[row, members[0]])
        for old in plan.dropped:
            slots = range(self.prefix, len(plan.groups))
            nearest = best(slots, lambda slot, old=old: cosine(metric[old], metric[plan.groups[slot][0]]))
            source[order[old]] = nearest
        return torch.stack(tokens), torch.stack(sizes), torch.stack(kept), source

    def restore(self, x: Tensor) -> Tensor:
        """Per-token output [batch, n, channels] -> [batch, tokens, channels]."""
        return torch.stack([row[source] for row, source in zip(x, self.source, strict=True)])

    def mean(self, x: Tensor, start: int = 0) -> Tensor:
        """Mean over the original tokens from ``start`` on [batch, channels]."""
        size = self.size[:, start:, None]
        return (x[:, start:] * size).sum(dim=1) / size.sum(dim=1)


# ----------------------------------------------------------------- blocks, restated with their reduction


def vit(layer: Any, reduce: Reduction, x: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
    x = reduce(x + layer.attention(layer.layernorm_before(x), attention_mask)[0])
    return x + layer.mlp(layer.layernorm_after(x))


def dinov2(
    layer: Any, reduce: Reduction, x: Tensor, attention_mask: Tensor | None = None, **_: Any
) -> Tensor:
    attended = layer.attention(layer.norm1(x), attention_mask=attention_mask)[0]
    x = reduce(x + layer.layer_scale1(attended))
    return x + layer.layer_scale2(layer.mlp(layer.norm2(x)))


def dinov3(layer: Any, reduce: Reduction, x: Tensor, position_embeddings: tuple, **_: Any) -> Tensor:
    special = reduce.original - position_embeddings[0].shape[0]
    tables = tuple(reduce.side(table, special)[:, None] for table in position_embeddings)
    attended = layer.attention(layer.norm1(x), position_embeddings=tables)[0]
    x = reduce(x + layer.layer_scale1(attended))
    return x + layer.layer_scale2(layer.mlp(layer.norm2(x)))


def clip(layer: Any, reduce: Reduction, x: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
    attended = layer.self_attn(hidden_states=layer.layer_norm1(x), attention_mask=attention_mask)[0]
    x = reduce(x + attended)
    return x + layer.mlp(layer.layer_norm2(x))


def beit(layer: Any, reduce: Reduction, x: Tensor, resolution: tuple[int, int], **_: Any) -> Tensor:
    window = tuple(side // layer.patch_size for side in resolution)
    bias = layer.relative_position_bias(window, False, dim_size=reduce.original)
    attended = layer.attention(layer.layernorm_before(x), attention_mask=bias)[0]
    x = reduce(x + layer.lambda_1 * attended)
    return x + layer.lambda_2 * layer.mlp(layer.layernorm_after(x))


def bert(layer: Any, reduce: Reduction, x: Tensor, attention_mask: Tensor, *_: Any, **__: Any) -> Tensor:
    attended = layer.attention.output.dense(layer.attention.self(x, attention_mask)[0])
    x = layer.attention.output.LayerNorm(reduce(x + attended))
    return layer.output.LayerNorm(x + layer.output.dense(layer.intermediate(x)))


def distilbert(layer: Any, reduce: Reduction, x: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
    x = layer.sa_layer_norm(reduce(x + layer.attention(x, attention_mask=attention_mask)[0]))
    return layer.output_layer_norm(x + layer.ffn(x))


def modernbert(
    layer: Any, reduce: Reduction, x: Tensor, attention_mask: Tensor, position_embeddings: tuple, **_: Any
) -> Tensor:
    tables = tuple(reduce.side(table[0]) for table in position_embeddings)
    attended = layer.attn(layer.attn_norm(x), position_embeddings=tables, attention_mask=attention_mask)[0]
    x = reduce(x + attended)
    return x + layer.mlp(layer.mlp_norm(x))


def whisper(
    layer: Any, reduce: Reduction, x: Tensor, attention_mask: Tensor | None = None, **_: Any
) -> Tensor:
    x = reduce(x + layer.self_attn(layer.self_attn_layer_norm(x), attention_mask=attention_mask)[0])
    return x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))


def attend(attention: Any, x: Tensor) -> Tensor:
    """A hand-written attention of the zoo, through ``scaled_dot_product_attention``."""
    if hasattr(attention, "inner"):
        return attention.inner(x, x, x, need_weights=False)[0]
    mixed = nn.functional.scaled_dot_product_attention(*attention.split(x))
    return attention.out(mixed.transpose(1, 2).reshape(x.shape))


def pre_norm(block: Any, reduce: Reduction, x: Tensor) -> Tensor:
    x = reduce(x + attend(block.attention, block.norm1(x)))
    return x + block.mlp(block.norm2(x))


def parallel(block: Any, reduce: Reduction, x: Tensor) -> Tensor:
    """Both branches read the same tokens, so the reduction follows the second add."""
    return reduce(x + attend(block.attention, block.norm1(x)) + block.mlp(block.norm2(x)))


def timm_vit(block: Any, reduce: Reduction, x: Tensor, **_: Any) -> Tensor:
    x = reduce(x + block.ls1(block.attn(block.norm1(x))))
    return x + block.ls2(block.mlp(block.norm2(x)))


def timm_eva(block: Any, reduce: Reduction, x: Tensor, rope: Tensor, **_: Any) -> Tensor:
    rope = reduce.side(rope, reduce.original - rope.shape[0])[:, None]
    x = reduce(x + block.attn(block.norm1(x), rope=rope))
    return x + block.mlp(block.norm2(x))


# ------------------------------------------------------------------------------------ pooling, restated


def siglip_head(head: Any, reduce: Reduction, x: Tensor) -> Tensor:
    probe = head.probe.repeat(x.shape[0], 1, 1)
    x = head.attention(probe, x, x, need_weights=False)[0]
    return (x + head.mlp(head.layernorm(x)))[:, 0]


def beit_pooler(pooler: Any, reduce: Reduction, x: Tensor) -> Tensor:
    return pooler.layernorm(reduce.mean(x, start=1))


def mean_pooled_text(model: Any, reduce: Reduction, **inputs: Tensor) -> Tensor:
    return reduce.mean(model.encoder(**inputs).last_hidden_state)


def timm_eva_pool(model: Any, reduce: Reduction, x: Tensor) -> Tensor:
    """``Eva.pool`` with its default average over the patch tokens."""
    return reduce.mean(x, start=model.num_prefix_tokens)


RESTATED: Mapping[str, Block] = {
    "ViTLayer": vit,
    "DeiTLayer": vit,
    "ViTMAELayer": vit,
    "Dinov2Layer": dinov2,
    "Dinov2WithRegistersLayer": dinov2,
    "DINOv3ViTLayer": dinov3,
    "CLIPEncoderLayer": clip,
    "SiglipEncoderLayer": clip,
    "BeitLayer": beit,
    "BertLayer": bert,
    "RobertaLayer": bert,
    "TransformerBlock": distilbert,
    "ModernBertEncoderLayer": modernbert,
    "WhisperEncoderLayer": whisper,
    "PreNormBlock": pre_norm,
    "ParallelBlock": parallel,
    "Block": timm_vit,
    "EvaBlock": timm_eva,
    "SiglipMultiheadAttentionPoolingHead": siglip_head,
    "BeitPooler": beit_pooler,
    "MeanPooledText": mean_pooled_text,
}
"""Class name -> the restated ``forward(module, reduction, ...)``."""


@contextlib.contextmanager
def restated(model: nn.Module, reduce: Reduction) -> Iterator[None]:
    """Replace the forward of every known module, and attention itself, until the end of the block."""
    functional: Any = nn.functional
    original = functional.scaled_dot_product_attention
    fast_path = torch.backends.mha.get_fastpath_enabled()
    changed: list[tuple[Any, str]] = []

    def replace(module: Any, method: str, forward: Block) -> None:
        setattr(module, method, lambda *args, **kwargs: forward(module, reduce, *args, **kwargs))
        changed.append((module, method))

    try:
        torch.backends.mha.set_fastpath_enabled(False)
        functional.scaled_dot_product_attention = reduce.attention
        for module in model.modules():
            if type(module).__name__ in RESTATED:
                replace(module, "forward", RESTATED[type(module).__name__])
        if type(model).__name__ == "Eva":
            replace(model, "pool", timm_eva_pool)
        yield
    finally:
        functional.scaled_dot_product_attention = original
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, method in changed:
            delattr(module, method)


@torch.no_grad()
def run_eager(*reduced: Any) -> Any:
    """The outputs alone of :func:`run_and_tell`, whose arguments it takes."""
    return run_and_tell(*reduced)[0]


def run_and_tell(
    name: str,
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    method: str,
    r: Sequence[int],
    options: Mapping[str, Any] | None = None,
) -> tuple[Any, Reduction]:
    """The outputs of zoo model ``name``, with tokens reduced by ``method``, and what was done to the tokens.

    Outputs are in the model's own structure. ``r`` gives the tokens removed in each block. ``options``: ``prefix``
    (protected leading tokens; the entry's by default), ``proportional`` (default True), ``margin`` (pitome: in the
    first block, 0.75), ``seed`` (random: 0). Raises KeyError for a model with blocks that have no restatement.
    """
    entry = ZOO[name]
    assert len(r) == entry.layers
    batch = next(iter(inputs.values())).shape[0]
    size = inputs[entry.mask] if entry.mask else torch.ones(batch, entry.tokens)
    settings = {"prefix": entry.prefix, "padded": entry.mask is not None, **(options or {})}
    reduce = Reduction(size, method, r, settings)
    with restated(model, reduce):
        result = model(**inputs)
    if reduce.layer != entry.layers:
        raise KeyError(f"{name}: {reduce.layer} of {entry.layers} blocks have a restatement")
    left = reduce.size.shape[1]

    def whole(value: Tensor) -> Tensor:
        per_token = value.ndim == 3 and value.shape[1] == left and entry.per_token
        return reduce.restore(value) if per_token else value

    return tree_map_only(Tensor, whole, result), reduce
