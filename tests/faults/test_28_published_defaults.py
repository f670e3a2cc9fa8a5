"""The docs did not say which defaults differ from the publications, and SnapKV's max pooling was no option.

The laws: ``pooling=max`` keeps what a maximum over neighbouring slots says (out of ONNX Runtime too, see
tests/matrix/test_eviction.py); a method's section of the docs names every default that its publication does not have.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.matrix.eviction import Entry, Head, snapkv
from tokopt.passes import load_pass
from tokopt.passes.kv.base import Cached, KVEviction
from tokopt.passes.kv.snapkv import SnapKV

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_pooling_is_over_neighbouring_slots(pooling: str, kernel: int) -> None:
    """Equal to the naive form in float64, also at both ends and beside padding."""
    generator = torch.Generator().manual_seed(kernel)
    tokens, padding, window = 9, 2, 3
    keys = torch.randn(tokens, 4, generator=generator)
    queries = torch.randn(window, 4, generator=generator)
    head = Head(
        [Entry(i, k, k, k) for i, k in enumerate(keys.double().numpy())], list(queries.double().numpy())
    )
    wanted = snapkv(head, window, kernel, {"avg": lambda x: x.mean(), "max": lambda x: x.max()}[pooling])
    used = torch.arange(padding + tokens)[None, None] >= padding
    newer = used.sum(-1, keepdim=True) - used.long().cumsum(-1)
    held = torch.nn.functional.pad(keys, (0, 0, padding, 0), value=7.0)[None, None]
    cached = Cached(held, held, torch.where(used, 1, -1), used, newer, torch.tensor([8]), None)  # type: ignore[arg-type]
    method = SnapKV(budget=99, recent=3, window=window, kernel=kernel, pooling=pooling)  # type: ignore[arg-type]
    score = method.score(cached, queries[None, None] / 2)  # scaled by 1 / sqrt(4)
    torch.testing.assert_close(score[0, 0, padding:], torch.tensor(wanted), atol=1e-5, rtol=1e-5)


UNPUBLISHED = {
    "h2o": ("sinks",),
    "keyformer": ("sinks",),
    "snapkv": ("sinks",),
    "knorm": ("sinks", "recent"),
    "keydiff": ("sinks", "recent"),
    "expected_attention": ("recent",),
}
"""Pass -> the defaults that keep tokens which the publication does not."""


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_docs_name_defaults_that_nobody_published(name: str) -> None:
    page = (DOCS / "kv-eviction.md").read_text()
    section = re.split(r"^## ", page, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(f"{name}\n")]
    cls = load_pass(name)
    assert issubclass(cls, KVEviction)
    method = cls(budget=512)
    for option in UNPUBLISHED[name]:
        assert getattr(method, option) > 0
        assert f"{option}=0" in text, f"the section of {name} does not give the published {option}=0"
