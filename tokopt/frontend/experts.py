"""Mixtures of experts in a form that has no loop over what the router chose: every expert, weighted by the router.

transformers multiplies each token with the experts that it was given to, group by group, which no graph of fixed
operators does. Here all experts see every token, and what the router did not choose counts nothing: the same sum, at
the cost of all experts.
"""

# transformers is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "tokopt_every_expert"


@contextmanager
def every_expert(model: nn.Module) -> Iterator[None]:
    """A model whose experts are computed without a loop; as it was afterwards."""
    configs = _configs(model)
    if not configs:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_NAME, _sum_of_all)
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


def _sum_of_all(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Tokens [tokens, hidden], their experts and weights [tokens, k] -> [tokens, hidden]."""
    into = "gate_up_proj" if self.has_gate else "up_proj"
    inner = _multiply(self, into, hidden_states)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    made = _multiply(self, "down_proj", inner)
    if self.has_post_expert_norm:
        made = self.post_expert_norm(made)
    experts = torch.arange(made.shape[0], device=made.device)
    chosen = top_k_index[..., None] == experts  # an index past the last expert is none
    share = torch.where(chosen, top_k_weights[..., None].to(made.dtype), 0.0).sum(1)
    return (made * share.T[..., None]).sum(0).to(hidden_states.dtype)


def _multiply(experts: Any, name: str, values: Tensor) -> Tensor:
    """[tokens, in] or [experts, tokens, in] -> [experts, tokens, out]."""
    weight = getattr(experts, name)
    made = torch.matmul(values, weight if experts.is_transposed else weight.transpose(-1, -2))
    return made + getattr(experts, f"{name}_bias")[:, None] if experts.has_bias else made
