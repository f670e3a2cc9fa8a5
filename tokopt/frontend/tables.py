"""Attention that looks up in a table which slot sees which (GPT-Neo): given the mask that its cache needs.

The table [1, 1, positions, positions] takes the slot of a token for its position, which it is not once rows are padded
or slots are moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokopt.frontend.sight import Sight

_TABLE = "bias"
"""How GPT-Neo calls it."""


def tables(model: nn.Module) -> dict[nn.Module, Sight]:
    """The modules that have such a table, and what it lets a token see."""
    found: dict[nn.Module, Sight] = {}
    for part in model.modules():
        table = dict(part.named_buffers(recurse=False)).get(_TABLE)
        if (
            table is not None
            and table.dtype == torch.bool
            and table.ndim == 4
            and table.shape[2] == table.shape[3]
        ):
            seen = int(table[0, 0, -1].sum())
            found[part] = Sight(0 if seen == table.shape[3] else seen)
    return found


@contextmanager
def replaced(found: Mapping[nn.Module, Sight], masks: Mapping[Sight, Tensor]) -> Iterator[None]:
    """Modules that find the masks [batch, 1, tokens, slots] in place of their tables."""
    with ExitStack() as undo:
        for part, sight in found.items():
            undo.callback(part.register_buffer, _TABLE, part._buffers.pop(_TABLE), persistent=False)
            undo.callback(part.__dict__.pop, _TABLE)
            part.__dict__[_TABLE] = _Looked(masks[sight])
        yield


class _Looked:
    """Gives the mask, whatever part of the table is asked for."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __getitem__(self, index: Any) -> Tensor:
        return self.mask
