"""A cache that two attentions read is written once.

Each of the two became a GroupQueryAttention that writes it, and export refused the result, though the portable form is
right. The law: the fused form takes an attention only where it alone reads a cache that it alone writes; what it leaves
stays as it is in the portable form, in the same file, and the reason is reported.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import tokopt
from tests.zoo.decoders import Cache, HandWritten
from tokopt.lower.cpu.form import fuse_for_kernels
from tokopt.lower.onnx.export import lower
from tokopt.lower.onnx.rule import Outcome
from tokopt.lower.onnxruntime.cpu import lower_for_cpu
from tokopt.runtime import load
from tokopt.runtime.engines.onnxruntime import ONE_ROW, OWN


class Small(HandWritten):
    def __init__(self, layers: int) -> None:
        torch.manual_seed(0)
        super().__init__(hidden=16, heads=1, layers=layers)


class SharedKeys(Small):
    """The second layer attends to what the first one wrote, the third has a cache of its own."""

    def __init__(self) -> None:
        super().__init__(3)

    def attended(
        self, layer: int, queries: Tensor, new: tuple[Tensor, Tensor], mask: Tensor, cache: Cache
    ) -> Tensor:
        if layer != 1:
            self.held = cache.update(min(layer, 1), *new)
        return functional.scaled_dot_product_attention(queries, *self.held, attn_mask=mask)


class OneValue(Small):
    """Two attentions with keys of their own and values in common."""

    def __init__(self) -> None:
        super().__init__(2)

    def attended(
        self, layer: int, queries: Tensor, new: tuple[Tensor, Tensor], mask: Tensor, cache: Cache
    ) -> Tensor:
        keys, values = cache.update(layer, *new)
        self.values = values if layer == 0 else self.values
        return functional.scaled_dot_product_attention(queries, keys, self.values, attn_mask=mask)


class KeysAreValues(Small):
    """What is attended to is what is summed."""

    def __init__(self) -> None:
        super().__init__(1)

    def attended(
        self, layer: int, queries: Tensor, new: tuple[Tensor, Tensor], mask: Tensor, cache: Cache
    ) -> Tensor:
        keys, _ = cache.update(layer, *new)
        return functional.scaled_dot_product_attention(queries, keys, keys, attn_mask=mask)


class QueriesOfKeys(Small):
    """Queries that depend on the keys in the cache, which are not written by the time they are needed."""

    def __init__(self) -> None:
        super().__init__(1)

    def attended(
        self, layer: int, queries: Tensor, new: tuple[Tensor, Tensor], mask: Tensor, cache: Cache
    ) -> Tensor:
        keys, values = cache.update(layer, *new)
        queries = queries + keys[:, :, :1].tanh()
        return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


class ScaledKeys(Small):
    """Keys that are changed after they are read."""

    def __init__(self) -> None:
        super().__init__(1)

    def attended(
        self, layer: int, queries: Tensor, new: tuple[Tensor, Tensor], mask: Tensor, cache: Cache
    ) -> Tensor:
        keys, values = cache.update(layer, *new)
        return functional.scaled_dot_product_attention(queries, keys * 2, values, attn_mask=mask)


def captured(kind: Callable[[], Small]) -> tokopt.Bundle:
    model = kind().eval().requires_grad_(False)
    return tokopt.capture_lm(model, generation=HandWritten.generation)


def test_two_readers_stay_and_the_third_layer_is_fused(tmp_path: Path) -> None:
    """Both forms are compared with the program at export, and generate what the model itself does."""
    lines: list[str] = []
    path = tokopt.export(captured(SharedKeys), tmp_path / "model.tokopt", progress=lines.append)
    said = [line for line in lines if "attention" in line]
    for what, line in zip(("node", "op of tokopt's CPU kernels"), said, strict=True):
        assert line.startswith(
            f"step: attention and its cache as one {what}: 1 of 3; left 2: its cache is read by 2 attentions"
        )
    model = load(path, threads=1)
    for form, kind in ((ONE_ROW, "GroupQueryAttention"), (OWN, "CachedAttention")):
        file = path / model.manifest.programs["step"].files[form]
        fused = onnx.load(file, load_external_data=False).graph
        kinds = collections.Counter(node.op_type for node in fused.node)
        assert (kinds[kind], kinds["Attention"], kinds["cache_write"]) == (1, 2, 3)
    ids = np.random.default_rng(0).integers(0, 97, 9).tolist()
    wanted = SharedKeys().eval().greedy(ids, 12)
    one = model.generate(ids, max_tokens=12)
    assert list(one.tokens) == wanted
    assert model.generate([ids, ids], max_tokens=12) == [one, one]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OneValue, "2: its cache is read by 2 attentions, each of which would write it"),
        (KeysAreValues, "1: its keys are its values"),
        (QueriesOfKeys, "1: its queries or its mask are computed from the cache that it writes"),
        (ScaledKeys, "1: its keys are not read from a cache as it was written"),
    ],
)
def test_what_one_kernel_cannot_write_stays(kind: Callable[[], Small], reason: str, tmp_path: Path) -> None:
    program, outcomes = captured(kind).main, list[Outcome]()
    path = lower(program, tmp_path, "step")
    assert lower_for_cpu(program, path, report=outcomes.append) is None
    assert f"left {reason}" in str(outcomes[0])
    assert list(tmp_path.glob("*.onnx")) == [path]
    *_, own = fuse_for_kernels(ir.load(path), program)
    assert f"left {reason}" in str(own)
