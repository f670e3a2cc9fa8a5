"""The matrix: every pass on every architecture equals the eager reference, or refuses with the named reason.

A new pass joins by one line in :data:`PASSES`, a new architecture by one entry of the zoo.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.utils._pytree import tree_leaves

import tokopt
from tests.matrix.eager import run_and_tell
from tests.zoo import ZOO, Entry
from tokopt.errors import PassRefused
from tokopt.ir.bundle import Bundle
from tokopt.measure.picture import PRUNED, token_groups

SCHEDULE = (4, 0, 3)
"""Tokens removed per block: an uneven list with a block left alone, where there are more than two."""


def schedule(entry: Entry) -> list[int]:
    """Tokens removed in each block of a model."""
    if entry.layers == 2:
        return [r for r in SCHEDULE if r > 0]
    return [*SCHEDULE, *[0] * (entry.layers - len(SCHEDULE))]


PASSES: dict[str, tuple[str, dict[str, object]]] = {
    "tome": ("tome{r=[4,0,3]}", {}),
    "pitome": ("pitome{r=[4,0,3] margin=0.5 matching=algorithm1}", {"margin": 0.5}),
    "pitome_deit": ("pitome{r=[4,0,3]}", {}),
    "evit_fused": ("evit{r=[4,0,3]}", {}),
    "evit": ("evit{r=[4,0,3] fuse=false}", {}),
    "divprune": ("divprune{r=[4,0,3]}", {}),
    "kcenter": ("kcenter{r=[4,0,3]}", {}),
    "random": ("random{r=[4,0,3] seed=3}", {"seed": 3}),
}
"""Eager method -> the pass's text and the reference's options."""

NO_CLASS_TOKEN = "attention of a class token, and this model protects none"
FUSED_DYNAMIC = "the fused token needs a fixed number of tokens"
WINDOWS = r"split into groups \(windows or a grid\)|no single axis"


def refusal(entry: Entry, method: str, prefix: int) -> str | None:
    """Why this pair must be refused, or None when it must work."""
    if entry.style == "windows":
        return WINDOWS
    if method.startswith("evit") and prefix == 0:
        return NO_CLASS_TOKEN
    if method == "evit_fused" and "tokens" in entry.dynamic[next(iter(entry.dynamic))]:
        return FUSED_DYNAMIC
    return None


@cache
def captured(name: str) -> Bundle:
    entry = ZOO[name]
    if not entry.available:
        pytest.skip(f"{entry.needs} is not installed")
    return tokopt.capture(entry.build(), (), entry.inputs(), dynamic=entry.dynamic)


def text_for(method: str, entry: Entry) -> str:
    """The pass's text, with a list of counts for the model's depth."""
    text, _ = PASSES[method]
    return text.replace("[4,0,3]", f"[{','.join(map(str, schedule(entry)))}]")


def assert_close(
    entry: Entry, inputs: dict[str, torch.Tensor], got: torch.Tensor, wanted: torch.Tensor
) -> None:
    """Normalised mean squared error below 1e-9; what stands at padding means nothing."""
    if entry.mask and wanted.dim() == 3:
        real = inputs[entry.mask].bool()
        got, wanted = got[real], wanted[real]
    assert got.shape == wanted.shape
    error = ((got.double() - wanted.double()) ** 2).mean() / (wanted.double() ** 2).mean().clamp_min(1e-30)
    assert error < 1e-9, f"NMSE {error:.2e}"


VARIANTS = ("pitome", "evit")
"""Passes with other options: ``pitome`` as it is in its later blocks anyway, ``evit`` without the token that it adds.
What an architecture can do to a pass it does to either, so that these run on a few."""

FEW = ("vit", "siglip", "dinov3", "bert", "modernbert", "mae", "parallel")
"""What the variants run on: a class token or none, rotary positions, padding, windows, tokens in random order, parallel
branches."""

PAIRS = [(method, name) for method in PASSES for name in ZOO if method not in VARIANTS or name in FEW]


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_pass_equals_eager_reference_or_refuses(method: str, name: str) -> None:
    entry, bundle = ZOO[name], captured(name)
    text = text_for(method, entry)
    reason = refusal(entry, method, entry.prefix)
    if reason is not None:
        with pytest.raises(PassRefused, match=reason):
            tokopt.optimize(bundle, text, strict=True)
        untouched = tokopt.optimize(bundle, text)
        assert untouched.main is bundle.main and untouched.history[-1].matches == 0
        return
    reduced = tokopt.optimize(bundle, text, strict=True)
    assert reduced.history[-1].matches == sum(r > 0 for r in SCHEDULE)
    inputs = entry.inputs().values()
    assert not all(map(torch.allclose, reduced(*inputs), bundle(*inputs)))
    compare_with_eager(entry, reduced, method, PASSES[method][1])


def compare_with_eager(entry: Entry, reduced: Bundle, method: str, options: dict[str, object]) -> None:
    """The outputs are those of the eager reference; where they are not, whether it took other tokens."""
    inputs = entry.inputs()
    options = {"prefix": entry.prefix, **options}
    with torch.no_grad():
        wanted, reduction = run_and_tell(entry.name, entry.build(), inputs, method, schedule(entry), options)
    try:
        for got, expected in zip(reduced(*inputs.values()), tree_leaves(wanted), strict=True):
            assert_close(entry, inputs, got, expected)
    except AssertionError as error:
        groups = token_groups(reduced.main, *inputs.values())[-1]
        others = ((groups != reduction.source.numpy()) & (groups != PRUNED)).sum()
        reason = (
            f"the selection differs on {others} of {groups.size} tokens"
            if others
            else "the selection is the same"
        )
        raise AssertionError(f"{error}; {reason}") from error


@pytest.mark.parametrize(
    ("seed", "reason"), [(4, r"the selection differs on \d+ of 185 tokens"), (3, "the selection is the same")]
)
def test_a_failure_says_whether_the_selection_differs(seed: int, reason: str) -> None:
    """Other tokens, and other numbers for the same tokens."""
    entry = ZOO["vit"]
    reduced = tokopt.optimize(captured("vit"), f"random{{r=[4,0,3] seed={seed}}}")
    if seed == 3:
        reduced = tokopt.optimize(reduced, "rtn{group=16}")
    with pytest.raises(AssertionError, match=reason):
        compare_with_eager(entry, reduced, "random", {"seed": 3})


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_is_its_rows(name: str, batch: int) -> None:
    """Dynamic batch: every row's result is what it would be alone."""
    entry, bundle = ZOO[name], captured(name)
    reduced = tokopt.optimize(bundle, text_for("tome", entry), strict=True)
    inputs = entry.inputs(batch=batch)
    together = reduced(*inputs.values())
    for row in range(batch):
        alone = reduced(*(t[row : row + 1] for t in inputs.values()))
        for whole, single in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[row : row + 1], single, atol=2e-5, rtol=1e-4)
