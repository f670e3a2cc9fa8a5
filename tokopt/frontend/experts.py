"""Mixtures of experts as ops: a product with the weights of the chosen experts is one ``tokopt::expert_linear``.

transformers multiplies each token with the experts that it was given to, group by group, which no graph of fixed
operators does. The op takes what the router chose as data, so that what it costs is left to whoever computes it.
"""

# transformers is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokopt.kernels import ops

_NAME = "tokopt_expert_linear"


@contextmanager
def experts_as_ops(model: nn.Module) -> Iterator[None]:
    """A model whose experts are computed without a loop; as it was afterwards."""
    configs = _configs(model)
    if not configs:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_NAME, _sum_of_chosen)
    before = [config._experts_implementation_internal for config in configs]
    try:
        for config in configs:
            config._experts_implementation_internal = _NAME
        yield
    finally:
        for config, spelling in zip(configs, before, strict=True):
            config._experts_implementation_internal = spelling


def _configs(model: nn.Module) -> list[Any]:
    """The configurations that modules of experts ask for their form."""
    found = {id(part.config): part.config for part in model.modules() if hasattr(part, "_is_expert_parallel")}
    return list(found.values())


def _sum_of_chosen(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Tokens [tokens, hidden], their experts and weights [tokens, k] -> [tokens, hidden]."""
    into = "gate_up_proj" if self.has_gate else "up_proj"
    inner = _multiply(self, into, hidden_states[:, None], top_k_index)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    made = _multiply(self, "down_proj", inner, top_k_index)
    if self.has_post_expert_norm:
        made = self.post_expert_norm(made)
    return (made * top_k_weights[..., None].to(made.dtype)).sum(1).to(hidden_states.dtype)


def _multiply(experts: Any, name: str, values: Tensor, chosen: Tensor) -> Tensor:
    """[tokens, k or 1, in] -> [tokens, k, out]; 0 for an index past the last expert, which is none."""
    weight = getattr(experts, name)
    made = ops.expert_linear(values, chosen, weight.transpose(-1, -2) if experts.is_transposed else weight)
    if not experts.has_bias:
        return made
    bias = getattr(experts, f"{name}_bias")
    known = (chosen < len(bias))[..., None]
    return torch.where(known, made + bias[chosen.clamp(max=len(bias) - 1)], 0.0)
