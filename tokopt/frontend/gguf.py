"""Weights of GGUF files, each mapped by itself and expanded when the model takes it.

transformers expands all of a file before the first weight is put into the model, and each by several copies of it. It
also reads the file's header, tokens and all, for every question anew, and makes gguf's table of names for every module.
"""

# gguf and transformers leave most of what they return untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

PART = 1 << 18
"""Bytes of a tensor that are expanded at a time."""


@dataclass(frozen=True)
class BlockTensor:
    """A tensor of a GGUF file; indexing it gives float32 numbers as the model wants them.

    ``place`` is what maps its data, ``kind`` the type of its blocks, and ``finish`` does to the expanded numbers what
    transformers does to those of this architecture.
    """

    place: Callable[[], np.ndarray]
    kind: Any
    finish: Callable[[np.ndarray], np.ndarray]

    def get_dtype(self) -> str:
        """As safetensors calls it."""
        return "F32"

    def __getitem__(self, place: Any) -> Tensor:
        """A part of the tensor, or with ``...`` all of it."""
        return torch.from_numpy(np.ascontiguousarray(self.finish(expanded(self.place(), self.kind))))[place]


def expanded(data: np.ndarray, kind: Any) -> np.ndarray:
    """The float32 numbers [..., numbers] of ``data`` [..., bytes] in blocks, expanded in parts."""
    gguf: Any = import_module("gguf")
    rows = data.reshape(-1, data.shape[-1])
    step = max(1, PART // max(1, rows[0].nbytes))
    parts = (gguf.dequantize(rows[start : start + step], kind) for start in range(0, len(rows), step))
    first = next(parts)
    made = np.empty((len(rows), first.shape[1]), np.float32)
    made[:step] = first
    for place, part in enumerate(parts, 1):
        made[place * step : (place + 1) * step] = part
    return made.reshape(*data.shape[:-1], -1)


@contextmanager
def expanded_one_by_one() -> Iterator[None]:
    """Inside, transformers gets the tensors of a GGUF file as :class:`BlockTensor`, and reads its header once."""
    loading: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    original: Any = loading.load_gguf_checkpoint
    header = cache(partial(original, return_tensors=False))

    def load(path: Any, return_tensors: bool = False, model_to_load: Any = None, **_: Any) -> Any:
        known = deepcopy(header(path))
        if return_tensors:
            known["tensors"] = _tensors(loading, Path(path), known["config"], model_to_load)
        return known

    with patch.object(loading, "load_gguf_checkpoint", load):
        yield


def _tensors(loading: Any, path: Path, config: Any, model: Any) -> dict[str, Any]:
    """The tensors of a file by their names in a model.

    Those that go by no name of the model, as the experts of a layer, are handed to transformers at once, which makes of
    them what it wants to.
    """
    gguf: Any = import_module("gguf")
    reader = gguf.GGUFReader(path)
    (architecture,) = loading.read_field(reader, "general.architecture")
    processor = loading.TENSOR_PROCESSORS.get(architecture, loading.TensorProcessor)(config=config)
    with patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)):
        names = loading.get_gguf_hf_weights_map(model, processor)
    made: dict[str, Any] = {"tensors": {}}
    for tensor in reader.tensors:
        data, kind, name = tensor.data, tensor.tensor_type, tensor.name
        if name not in names:
            processor.process(
                weights=expanded(data, kind), name=name, tensor_key_mapping=names, parsed_parameters=made
            )
            continue
        place = partial(np.memmap, path, data.dtype, "r", int(tensor.data_offset), data.shape)
        made["tensors"][names[name]] = BlockTensor(place, kind, partial(_finished, processor, name, names))
    return made["tensors"]


def _finished(processor: Any, name: str, names: Any, weights: np.ndarray) -> np.ndarray:
    """What transformers makes of the expanded numbers of a tensor."""
    aside: dict[str, Any] = {"tensors": {}}
    done = processor.process(weights=weights, name=name, tensor_key_mapping=names, parsed_parameters=aside)
    return aside["tensors"][names[name]].numpy() if done.name is None else done.weights
