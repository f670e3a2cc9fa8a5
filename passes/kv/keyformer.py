"""Keyformer: accumulated attention of noisy, ever softer logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokopt.analysis.cache import CachedAttention
from tokopt.passes.kv.base import Cached, KVEviction
from tokopt.passes.kv.h2o import mass_memory
from tokopt.rewrite.cache import Attention, Memory

COOLING = 0.01
"""How much the temperature rises with every generated token."""

_PRIME = 1_048_573


@dataclass(frozen=True)
class Keyformer(KVEviction):
    """``sum over queries of softmax((logits + Gumbel noise) / T)``, ``T = 1 + 0.01 t`` (arXiv 2403.09054).

    ``t`` counts generated tokens; it is 0 in the prompt. The noise is computed from the query's position, the
    slot, the head and ``seed``, so a run repeats exactly and every backend agrees; ``noise=false`` leaves it out,
    and then ``T = 1`` everywhere would be ``h2o``. As in the authors' examples, 30 % of the budget is the newest
    tokens; the paper has no sinks (``sinks=0``).
    """

    recent: int | float = 0.3
    noise: bool = True
    seed: int = 0

    name: ClassVar[str] = "keyformer"

    def memory(self, layer: CachedAttention) -> tuple[Memory, ...]:
        """The mass of every slot, and one more than the number of generated tokens (0 in the prompt)."""
        return (mass_memory(layer), Memory("generated", "int64", ("batch",)))

    def observe(self, attention: Attention, *memory: Tensor) -> tuple[Tensor, ...]:
        """Add what this call's queries attend to under noise and temperature."""
        mass, generated = memory
        logits = attention.logits()
        if self.noise:
            logits = logits + gumbel(attention, self.seed)
        real = attention.positions >= 0
        before = real.long().cumsum(1) - real.long()  # tokens of the call before each
        counting = (generated > 0)[:, None]
        temperature = 1 + COOLING * torch.where(counting, generated[:, None] + before, 0)
        logits = logits / temperature[:, None, None, :, None]
        weights = torch.where(real[:, None, None, :, None], logits.softmax(dim=-1), 0.0)
        total = torch.where(counting[:, 0], generated + real.sum(1), 0)
        return (mass + weights.sum(dim=(2, 3))[..., None], total)

    def carry(self, *memory: Tensor) -> tuple[Tensor, ...]:
        """After the prompt, begin to count."""
        mass, generated = memory
        return (mass, generated.clamp(min=1))

    def score(self, cached: Cached, *memory: Tensor) -> Tensor:
        """The accumulated mass."""
        return memory[0][..., 0]


def gumbel(attention: Attention, seed: int) -> Tensor:
    """Noise [batch, key heads, queries per key head, tokens, slots] from a hash in whole numbers."""
    heads, slots = attention.query.shape[1], attention.key.shape[2]
    device = attention.query.device
    place = attention.positions.clamp(min=0)[:, None, :, None] * 7919 + (1009 * seed + 1)
    head = torch.arange(heads, device=device)[:, None, None] * 104_729
    value = place + head + torch.arange(slots, device=device) * 15_485_863
    for multiplier in (48_271, 69_621, 16_807):
        value = (value % _PRIME * multiplier) % _PRIME
        value = (value * value + 12_345) % _PRIME
    uniform = (value.float() + 0.5) / _PRIME
    return (-(-uniform.log()).log()).unflatten(1, (attention.key.shape[1], -1))
