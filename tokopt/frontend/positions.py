"""Positions for models of transformers that would find them by themselves, in the length of their cache or in a mask.

A cache whose slots are data has no length that says where a token stands. What computes with positions inside such a
model is given them: modules that embed positions, and the functions that make the bias of ALiBi.
"""

# transformers is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

_ALIBI = "build_alibi_tensor"
"""The function of a model's file that makes a bias of a mask of keys (BLOOM, Falcon)."""

_MPT = "build_mpt_alibi_tensor"
"""The method of MPT that makes one of a number of keys."""


def finds_positions(model: nn.Module) -> bool:
    """Whether :func:`placed` knows what looks for positions in a model which does not take ``position_ids``."""
    return any(_places(part) or hasattr(part, _ALIBI) or hasattr(part, _MPT) for part in model.modules())


def first_position(model: nn.Module) -> int:
    """What a model calls the first position: RoBERTa counts from the index of its padding token on."""
    found = [part for part in model.modules() if hasattr(part, "create_position_ids_from_input_ids")]
    padding: Any = getattr(found[0], "padding_idx", None) if found else None
    return 0 if padding is None else int(padding) + 1


@contextmanager
def placed(model: nn.Module, positions: Tensor, held: Tensor) -> Iterator[None]:
    """A model that is told the positions [batch, tokens] of its tokens and [batch, slots] of its keys."""
    with ExitStack() as undo:
        if "position_ids" not in inspect.signature(model.forward).parameters:
            for part in model.modules():
                if _places(part):
                    _set(undo, part, "forward", _embedding(part, positions))
        for part in model.modules():
            if hasattr(part, _MPT):
                _set(undo, part, _MPT, _mpt(getattr(part, _MPT), held))
        file: Any = sys.modules[type(model).__module__]
        if hasattr(file, _ALIBI):
            own = getattr(file, _ALIBI)
            undo.callback(setattr, file, _ALIBI, own)
            setattr(file, _ALIBI, lambda mask, heads, dtype: own(_Keys(held), heads, dtype))
        yield


def _set(undo: ExitStack, part: Any, name: str, value: object) -> None:
    undo.callback(delattr, part, name)  # the class has its own
    setattr(part, name, value)


def _places(part: nn.Module) -> bool:
    """Whether a module embeds positions that it counts on from the length of the cache, unless it is given them."""
    return {"position_ids", "past_key_values_length"} <= set(inspect.signature(part.forward).parameters)


def _embedding(part: nn.Module, positions: Tensor) -> Callable[..., Tensor]:
    own, signature = part.forward, inspect.signature(part.forward)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs)
        given.arguments["position_ids"] = positions.flatten()  # some take one axis alone
        return own(*given.args, **given.kwargs).reshape(*positions.shape, -1)

    return forward


class _Keys:
    """Stands for a mask of keys [batch, slots], of which ``(mask.cumsum(-1) - 1) * mask`` is their positions."""

    def __init__(self, held: Tensor) -> None:
        self.held, self.shape, self.device = held, held.shape, held.device

    def cumsum(self, dim: int) -> Tensor:
        return self.held + 1

    def __rmul__(self, positions: Tensor) -> Tensor:
        return positions


def _mpt(own: Callable[..., Tensor], held: Tensor) -> Callable[..., Any]:
    def bias(heads: int, length: int, *args: Any, **kwargs: Any) -> Any:
        slopes = -own(heads, 2, *args, **kwargs)[:, :, :1]  # of the last key but one: minus one slope
        return _Bias(slopes * held[:, None, None, :])

    return bias


class _Bias:
    """A bias [batch, heads, 1, slots] where the model takes one [heads, 1, slots], and cuts it to its keys."""

    def __init__(self, bias: Tensor) -> None:
        self.bias, self.shape = bias, bias.shape[1:]

    def size(self, axis: int) -> int:
        return 0

    def __getitem__(self, index: object) -> _Bias:
        return self

    def __radd__(self, logits: Tensor) -> Tensor:
        return logits + self.bias
