"""Weights of safetensors files, each mapped by itself.

safetensors maps a whole file, and every tensor of it keeps the whole. Mapped one by one, a weight that was expanded to
float32, or replaced by codes of 4 bits, leaves memory while the others stay.
"""

# safetensors and transformers leave most of what they return untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

_DTYPES: Mapping[str, tuple[type[np.generic], torch.dtype]] = {
    "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16),
    "BF16": (np.uint16, torch.bfloat16),
}
"""Name of a dtype in the file -> the dtype that numpy maps it in, and the one that it is."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, of a dtype that the file names; indexing it maps it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def get_dtype(self) -> str:
        """As safetensors calls it."""
        return self.dtype

    def get_shape(self) -> list[int]:
        """The size of every axis."""
        return list(self.shape)

    def __getitem__(self, place: Any) -> Tensor:
        """A part of the tensor, or with ``...`` all of it; a page of the file is copied when it is written to."""
        held, dtype = _DTYPES[self.dtype]
        mapped = np.memmap(self.path, held, "c", self.offset, self.shape)
        return torch.from_numpy(mapped).view(dtype)[place]


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file that can be mapped, by name; empty ones and other dtypes are left out."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return {
        name: StoredTensor(path, known["dtype"], shape, 8 + length + known["data_offsets"][0])
        for name, known in header.items()
        if name != "__metadata__" and known["dtype"] in _DTYPES and 0 not in (shape := tuple(known["shape"]))
    }


def expansion_note(folder: Path) -> str | None:
    """That weights of fewer bits are computed in float32, and what that takes; None where none are.

    Raises OSError or ValueError for files that are no safetensors.
    """
    tensors = [one for path in folder.glob("*.safetensors") for one in stored_tensors(path).values()]
    dtypes = {str(_DTYPES[one.dtype][1]).removeprefix("torch.") for one in tensors} - {"float32"}
    size = sum(4 * math.prod(one.shape) for one in tensors)
    if not dtypes:
        return None
    return f"weights stored in {' and '.join(sorted(dtypes))} are computed in float32, which takes {size / 1e9:.2g} GB"


class _Opened:
    """A file as safetensors opens it, but that tensors are mapped one by one."""

    def __init__(self, opened: Any, path: Path) -> None:
        self._opened, self._tensors = opened, stored_tensors(path)

    def get_slice(self, name: str) -> Any:
        """What gives the tensor when it is indexed."""
        return self._tensors.get(name) or self._opened.get_slice(name)

    def __enter__(self) -> _Opened:
        self._opened.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)


@contextmanager
def mapped_one_by_one() -> Iterator[None]:
    """Inside, transformers maps every tensor that it loads by itself; whole files where it opens them elsewhere."""
    loading: Any = import_module("transformers.modeling_utils")
    original: Any = getattr(loading, "safe_open", None)
    if original is None:
        yield
        return

    def opened(path: Any, *args: Any, **options: Any) -> Any:
        return _Opened(original(path, *args, **options), Path(path))

    with patch.object(loading, "safe_open", opened):
        yield
