"""Rotary embeddings of transformers that turn by other frequencies once a text is long (``dynamic``, ``longrope``).

A text that gets longer than the model was first trained for is turned anew as a whole, and so would be the keys that a
cache holds already. Up to that length the frequencies are fixed: there a cache is exact.
"""

# transformers is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

_ORIGINAL = "original_inv_freq"
"""How transformers names the frequencies of short texts; those in use are named without ``original_``."""


def longest_fixed(config: Any) -> int | None:
    """Up to which length the frequencies of a configuration are the same ones, None where they always are."""
    given: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = [one for one in given.values() if isinstance(one, Mapping)] or [given]
    lengths = {
        "dynamic": [getattr(config, "max_position_embeddings", None)],
        "longrope": [one.get("original_max_position_embeddings") for one in kinds],
    }
    found = [length for one in kinds for length in lengths.get(one.get("rope_type", ""), ())]
    return min((length for length in found if length is not None), default=None)


@contextmanager
def fixed_frequencies(model: nn.Module) -> Iterator[None]:
    """Rotary embeddings with the frequencies of short texts; everything as it was afterwards."""
    with ExitStack() as undo:
        for module in model.modules():
            if _changes(module):
                _fix(module, undo)
        yield


def _changes(module: nn.Module) -> bool:
    kinds: Any = getattr(module, "rope_type", ())
    return not {"dynamic", "longrope"}.isdisjoint(kinds.values() if isinstance(kinds, Mapping) else (kinds,))


def _fix(module: Any, undo: ExitStack) -> None:
    kinds = module.rope_type
    undo.callback(setattr, module, "rope_type", kinds)
    module.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, Mapping) else "default"
    for name, short in list(module.named_buffers(recurse=False)):
        if name.endswith(_ORIGINAL):
            used = name.removesuffix(_ORIGINAL) + _ORIGINAL.removeprefix("original_")
            undo.callback(setattr, module, used, getattr(module, used))
            setattr(module, used, short.clone())
