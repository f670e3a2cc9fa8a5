"""The laws of the eager reference itself: it restates the models, and its reductions conserve tokens."""

from __future__ import annotations

from functools import cache
from itertools import cycle

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.matrix.eager import METHODS, Reduction, run_eager
from tests.zoo import ZOO, Entry

REDUCIBLE = [entry for entry in ZOO.values() if entry.style != "windows"]


def real(entry: Entry, inputs: dict[str, torch.Tensor], value: torch.Tensor) -> torch.Tensor:
    """``value`` without what stands at padding."""
    per_token = entry.mask and value.ndim == 3
    return value[inputs[entry.mask].bool()] if entry.mask and per_token else value


@pytest.fixture(params=REDUCIBLE, ids=[entry.name for entry in REDUCIBLE])
def entry(request: pytest.FixtureRequest) -> Entry:
    entry: Entry = request.param
    if not entry.available:
        pytest.skip(f"{entry.needs} is not installed")
    return entry


@torch.no_grad()
def test_removing_nothing_is_the_model(entry: Entry) -> None:
    model, inputs = entry.build(), entry.inputs()
    expected = tree_leaves(model(**inputs))
    actual = tree_leaves(run_eager(entry.name, model, inputs, "tome", [0] * entry.layers))
    for value, computed in zip(expected, actual, strict=True):
        torch.testing.assert_close(
            real(entry, inputs, computed), real(entry, inputs, value), atol=2e-5, rtol=1e-4
        )
    again = tree_leaves(model(**inputs))
    torch.testing.assert_close(again, expected)  # nothing stays replaced


@cache
def unreduced(name: str) -> list[torch.Tensor]:
    """What the reference gives when no block is reduced, by whichever method."""
    entry = ZOO[name]
    return tree_leaves(run_eager(name, entry.build(), entry.inputs(batch=2), "tome", [0] * entry.layers))


TURNS = list(zip(REDUCIBLE, cycle(METHODS), strict=False))
"""Every model with one method, every method on two: test_matrix.py runs nearly all pairs, against the passes."""


@pytest.mark.parametrize(("entry", "method"), TURNS, ids=[f"{one.name}-{method}" for one, method in TURNS])
def test_every_method_runs_and_changes_the_model(entry: Entry, method: str) -> None:
    if not entry.available:
        pytest.skip(f"{entry.needs} is not installed")
    inputs = entry.inputs(batch=2)
    r = [6, 3] if entry.layers == 2 else [6, 0, 3] + [0] * (entry.layers - 3)
    expected = unreduced(entry.name)
    actual = tree_leaves(run_eager(entry.name, entry.build(), inputs, method, r))
    for value, computed in zip(expected, actual, strict=True):
        assert value.shape == computed.shape
        assert real(entry, inputs, computed).isfinite().all()
    assert any(not torch.allclose(v, c, atol=1e-4) for v, c in zip(expected, actual, strict=True))


@pytest.mark.parametrize("method", ["tome", "pitome"])
def test_merging_conserves_sizes_and_the_weighted_sum(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 23)
    mask[1, 15:] = 0
    reduce = Reduction(mask, method, [7, 5], {"prefix": 2, "margin": 0.5})
    x = torch.randn(3, 23, 6, generator=generator)
    total = (x * mask[..., None]).sum(dim=1)
    for _ in range(2):
        reduce.keys = torch.randn(3, 4, x.shape[1], 8, generator=generator)
        reduce.weights = torch.rand(3, 4, x.shape[1], x.shape[1], generator=generator)
        x = reduce(x)
    assert x.shape[1] == 23 - 12
    torch.testing.assert_close(reduce.size.sum(dim=1), mask.sum(dim=1))
    torch.testing.assert_close((x * reduce.size[..., None]).sum(dim=1), total)
    for b in range(3):
        counts = torch.zeros(11).index_add(0, reduce.source[b], mask[b])
        torch.testing.assert_close(counts, reduce.size[b])


@torch.no_grad()
def test_merging_exact_duplicates_is_exact() -> None:
    """Tokens that are pairwise equal merge without loss, because the sizes enter the attention."""
    entry = ZOO["siglip"]
    model = entry.build()
    model.get_parameter("embeddings.position_embedding.weight").zero_()
    images = entry.inputs()["pixel_values"]
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).reshape(images.shape[0], 3, 49, 4, 4)
    patches[:, :, 1:48:2] = patches[:, :, 0:48:2]
    rows = patches.reshape(-1, 3, 7, 7, 4, 4).permute(0, 1, 2, 4, 3, 5)
    inputs = {"pixel_values": rows.reshape(images.shape)}
    expected = tree_leaves(model(**inputs))
    merged = tree_leaves(run_eager("siglip", model, inputs, "tome", [24, 0, 0]))
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)
    without = run_eager("siglip", model, inputs, "tome", [24, 0, 0], {"proportional": False})
    assert (tree_leaves(without)[1] - expected[1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "pitome", "divprune", "kcenter"])
def test_padding_goes_first_and_costs_nothing(method: str) -> None:
    """A row with enough padding loses only padding, so its real tokens are unchanged."""
    entry = ZOO["bert"]
    model, inputs = entry.build(), entry.inputs(batch=2)
    expected = model(**inputs).last_hidden_state
    r = [4, 0, 2]
    actual = run_eager("bert", model, inputs, method, r).last_hidden_state
    length = int(inputs["attention_mask"][1].sum())
    torch.testing.assert_close(actual[1, :length], expected[1, :length], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(actual[0], expected[0], atol=1e-3)
