"""Small random models of any class of transformers, from the defaults of its configuration."""

# transformers is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tests.sweep.exceptions import ANYWHERE, SETTINGS, SIZES, Nested

LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types")
"""Fields that give each layer its kind: a small model has a layer of each kind."""

LAYERS = 2
"""Fewest layers of a model."""


def build(model_class: Any, seed: int = 0) -> Any:
    """A random model of ``model_class`` in evaluation mode, without gradients, in float32."""
    config = tiny_config(model_class.config_class, SETTINGS.get(model_class.__name__, {}))
    torch.manual_seed(seed)
    return randomize(model_class(config), seed)


def tiny_config(kind: Any, settings: Mapping[str, Any]) -> Any:
    """A configuration of ``kind``: its defaults, made small; ``settings`` come last and may be nested."""
    return kind(**_small(kind, settings))


def _small(kind: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    default = _default(kind, settings)
    alias = {own: name for name, own in getattr(kind, "attribute_map", {}).items()}
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        name = field.name
        value = _value(default, name)
        if name in SIZES:
            found |= _sized(name, SIZES[name], value)
        elif alias.get(name) in SIZES:
            found |= _sized(name, SIZES[alias[name]], value)
    if "kv_lora_rank" in found:  # latent attention has a key for every query
        found["num_key_value_heads"] = found["num_attention_heads"]
        found.pop("head_dim", None)
    for name, part in getattr(kind, "sub_configs", {}).items():
        given = _value(default, name)
        if given is not None:
            nested = settings.get(name, {})
            part = type(given) if not isinstance(given, dict) else part
            found[name] = _small(part, nested) | {"model_type": part.model_type}
    found |= _layers(kind, default, {**found, **settings})
    return found | {name: value for name, value in settings.items() if not isinstance(value, Nested)}


def _default(kind: Any, settings: Mapping[str, Any]) -> Any:
    try:
        return kind()
    except Exception:
        return kind(**{name: value for name, value in settings.items() if not isinstance(value, Nested)})


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # an attribute that differs from layer to layer
        return ANYWHERE


def _sized(name: str, size: Any, default: Any) -> dict[str, Any]:
    """The size where the configuration has such a field: what is None, or empty, is derived, or off."""
    if default is None or default is False:
        return {}
    if default is ANYWHERE or isinstance(size, (str, type(None))):
        return {name: size}
    if isinstance(default, (list, tuple)) and not isinstance(size, (list, tuple)):
        return _graded(name, size, default)
    number: Any = size
    return {name: float(number) if isinstance(default, float) else size}


def _graded(name: str, size: int, default: Sequence[Any]) -> dict[str, Any]:
    """Sizes of stages: widths that grow, depths that do not; lists of anything else stay."""
    kind: Any = type(default)
    if not all(isinstance(one, int) for one in default):
        return {}
    if name in ("depths", "num_attention_heads", "num_heads"):
        return {name: kind(min(one, size if name == "depths" else 2) for one in default)}
    if name in ("hidden_sizes", "embed_dims", "embed_dim", "neck_hidden_sizes", "encoder_hidden_sizes"):
        return {name: kind(16 * (place + 1) for place in range(len(default)))}
    if name in ("image_size", "patch_size"):
        return {name: kind(size for _ in default)}
    return {}


def _layers(kind: Any, default: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Layers of every kind: the first of each, in order."""
    names = {field.name for field in dataclasses.fields(kind)}
    lists = {name: list(_value(default, name) or ()) for name in LAYER_LISTS if name in names}
    lists = {name: kinds for name, kinds in lists.items() if kinds and name not in found}
    count = next(
        (found[name] for name in ("num_hidden_layers", "num_layers", "n_layer") if name in found), LAYERS
    )
    if not lists:
        return {}
    picked: list[int] = []
    for name in lists:
        seen = {lists[name][i] for i in picked if i < len(lists[name])}
        for i, one in enumerate(lists[name]):
            if one not in seen:
                seen.add(one)
                picked.append(i)
    picked = sorted(set(picked))
    while len(picked) < count:
        picked.append(picked[-1])
    made: dict[str, Any] = {
        name: [kinds[min(i, len(kinds) - 1)] for i in picked] for name, kinds in lists.items()
    }
    for name in ("num_hidden_layers", "num_layers"):
        if name in names and name in found:
            made[name] = len(picked)
    return made


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded values of realistic scale for all parameters: default ones leave biases zero and features nearly equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * (1.0 if "emb" in name else 2.0) / math.sqrt(_fan_in(name, parameter)))
            else:
                centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
                layer_scale = any(word in name for word in ("lambda", "gamma", "ls1", "ls2"))
                parameter.copy_((0.8 if layer_scale else centre) + 0.2 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("bias") and buffer.is_floating_point():
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
    return model.eval().requires_grad_(False)


def _fan_in(name: str, parameter: torch.Tensor) -> int:
    """How many inputs a weight sums over; experts [experts, out, in] are matrices in a row."""
    if "expert" in name and parameter.ndim == 3:
        return parameter.shape[-1]
    return max(parameter[0].numel(), 1)
