"""Every zoo model builds deterministically and runs; ``tests/frontend`` captures it with its named axes dynamic."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.zoo import ZOO, Entry


def outputs(result: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


@pytest.fixture(params=ZOO.values(), ids=list(ZOO))
def entry(request: pytest.FixtureRequest) -> Entry:
    entry: Entry = request.param
    if not entry.available:
        pytest.skip(f"{entry.needs} is not installed")
    return entry


@torch.no_grad()
def test_builds_equal_twice(entry: Entry) -> None:
    model, again = entry.build(), entry.build()
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    inputs = entry.inputs()
    expected = outputs(model(**inputs))
    for value, repeated in zip(expected, outputs(again(**inputs)), strict=True):
        assert value.isfinite().all() and value.float().std() > 1e-3
        torch.testing.assert_close(value, repeated)


@torch.no_grad()
def test_states_its_outputs(entry: Entry) -> None:
    """``per_token`` names outputs whose axis 1 has ``tokens`` slots, and no other output has that axis."""
    result = entry.build()(**entry.inputs())
    named = dict(result.items()) if hasattr(result, "items") else {"output": result}
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    if entry.style == "windows":
        return
    for name, value in tensors.items():
        assert (value.ndim == 3 and value.shape[1] == entry.tokens) == (name in entry.per_token), name
