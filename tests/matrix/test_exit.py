"""Exits on every architecture: the limit is the model, an exit the model without later blocks, and rows are alone."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import tokopt
from tests.matrix.test_matrix import assert_close, captured
from tests.zoo import ZOO, Entry
from tokopt.analysis.blocks import blocks_of
from tokopt.errors import PassRefused
from tokopt.ir.bundle import Bundle
from tokopt.ir.program import Program
from tokopt.runtime import load

PER_TOKEN = (
    "reads features .batch, n., and none of the outputs last_hidden_state has that form; of outputs per token no "
    "row leaves, since it leaves as a whole"
)
REFUSED = {
    "mae": "output 'mask' does not come from the last block",
    "swin": "the stream is .* after 1 of [0-9]+ blocks and .* at the model's end",
    "distilbert": PER_TOKEN,
    "modernbert": PER_TOKEN,
    "whisper": PER_TOKEN,
}
"""Models that the pass refuses, and why."""

NEVER = "exit{after=[1] rule=convergence threshold=1.0 fit=own}"


def given(bundle: Bundle, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(bundle.inputs, inputs.values(), strict=True))


@pytest.mark.parametrize("name", list(ZOO))
def test_where_no_row_leaves_the_stages_are_the_model(name: str) -> None:
    """Bit for bit; and all rows have all blocks behind them."""
    bundle, entry = captured(name), ZOO[name]
    if name in REFUSED:
        with pytest.raises(PassRefused, match=REFUSED[name]):
            tokopt.optimize(bundle, NEVER, strict=True)
        assert tokopt.optimize(bundle, NEVER).programs == bundle.programs
        return
    staged = tokopt.optimize(bundle, NEVER, strict=True)
    inputs = entry.inputs(seed=3)
    made = staged.staged(given(staged, inputs))
    for want, got in zip(bundle(*inputs.values()), made.outputs.values(), strict=True):
        assert torch.equal(want, got)
    assert made.depths.tolist() == [entry.layers] * len(made.depths)
    assert staged.semantics == "approximate"


def shortened(entry: Entry, depth: int) -> nn.Module:
    """The model as it is built, without the blocks after ``depth``."""
    model = entry.build()
    lists = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) == entry.layers
    ]
    (parent, name, blocks), *_ = lists
    setattr(parent, name, blocks[:depth])
    return model


@pytest.mark.parametrize("name", [name for name in ZOO if name not in REFUSED])
def test_an_exit_with_the_models_own_head_is_the_shorter_model(name: str) -> None:
    entry = ZOO[name]
    staged = tokopt.optimize(captured(name), NEVER, strict=True)
    inputs = entry.inputs(seed=4)
    with torch.no_grad():
        wanted = tree_leaves(shortened(entry, 1)(**inputs))
    made = staged.staged(given(staged, inputs), depth=1)
    for got, want in zip(made.outputs.values(), wanted, strict=True):
        assert_close(entry, inputs, got, want)
    full = staged(*inputs.values())
    assert any(not torch.allclose(a, b) for a, b in zip(full, made.outputs.values(), strict=True))


# --- after tokens were merged or pruned ---------------------------------------------------------------------

REDUCED = {
    "vit": "tome{r=[3,2,1]}",
    "siglip": "tome{r=2},kcenter{r=[1,2,3]}",
    "beit": "evit{r=[3,2]}",
    "dinov3": "divprune{r=[2,3]}",
}
"""Sizes and merge maps, which go from stage to stage; a pooling head; tables of biases; rotary tables."""


@pytest.mark.parametrize("name", list(REDUCED))
def test_where_no_row_leaves_the_stages_are_the_reduced_model(name: str) -> None:
    """Bit for bit; and a later stage has the tokens that are left."""
    reduced, inputs = tokopt.optimize(captured(name), REDUCED[name], strict=True), ZOO[name].inputs(seed=3)
    staged = tokopt.optimize(reduced, NEVER, strict=True)
    made = staged.staged(given(staged, inputs))
    for want, got in zip(reduced(*inputs.values()), made.outputs.values(), strict=True):
        assert torch.equal(want, got)
    tokens = [n for name in staged.encoders for n in _tokens(staged.programs[name])]
    assert tokens == _tokens(reduced.main) and tokens[1] < tokens[0]


def _tokens(program: Program) -> list[int]:
    return [block.site.tokens for block in blocks_of(program.module.graph)]


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_an_exit_of_a_merged_model_is_the_shorter_model_merged(name: str) -> None:
    entry, inputs = ZOO[name], ZOO[name].inputs(seed=4)
    staged = tokopt.optimize(captured(name), f"tome{{r=2}},{NEVER}", strict=True)
    shorter = tokopt.capture(shortened(entry, 1), tuple(inputs.values()), dynamic=entry.dynamic)
    wanted = tokopt.optimize(shorter, "tome{r=2}", strict=True)(*inputs.values())
    made = staged.staged(given(staged, inputs), depth=1)
    for got, want in zip(made.outputs.values(), wanted, strict=True):
        assert_close(entry, inputs, got, want)


def test_a_text_of_any_length_is_merged_after_the_exits_were_put() -> None:
    """How many tokens are left is no plain axis; with texts of one length it is a number."""
    bundle, inputs = captured("minilm"), ZOO["minilm"].inputs(seed=3)
    with pytest.raises(PassRefused, match=r"an axis of tokens - 2, .*; capture with fixed sizes"):
        tokopt.optimize(bundle, f"tome{{r=2}},{NEVER}", strict=True)
    fixed = dict.fromkeys(ZOO["minilm"].dynamic, ("batch", None))
    text = tokopt.capture(ZOO["minilm"].build(), tuple(inputs.values()), dynamic=fixed)
    merged = tokopt.optimize(text, "tome{r=2}", strict=True)
    staged = tokopt.optimize(merged, NEVER, strict=True)
    made = staged.staged(given(staged, inputs))
    for want, got in zip(merged(*inputs.values()), made.outputs.values(), strict=True):
        assert torch.equal(want, got)


def test_a_merged_model_that_was_saved_is_refused(tmp_path: Path) -> None:
    path = tokopt.export(
        tokopt.optimize(captured("vit"), "tome{r=2}"), tmp_path / "merged.tokopt", target="torch"
    )
    with pytest.raises(PassRefused, match="give the reduction and exit in one pipeline"):
        tokopt.optimize(tokopt.open_bundle(path), NEVER, strict=True)


# --- artifacts ----------------------------------------------------------------------------------------------


MODELS = ("vit", "minilm", "siglip", "dinov3")
"""Two outputs; padding that the head reads too; a pooling head; rotary tables, which no link carries."""


@cache
def split_rows(name: str, rule: str, before: str = "") -> tuple[Bundle, dict[str, torch.Tensor]]:
    """A model with two exits whose threshold parts the rows of a batch, which is found by trying."""
    bundle, inputs = tokopt.optimize(captured(name), before), ZOO[name].inputs(batch=8, seed=5)
    low, high = {"entropy": (0.0, 5.0), "convergence": (1.0, -1.0)}[rule]
    for _ in range(20):
        middle = (low + high) / 2
        staged = tokopt.optimize(
            bundle, f"exit{{after=[1,2] rule={rule} threshold={middle} fit=own}}", strict=True
        )
        depths = staged.staged(given(staged, inputs)).depths
        early = int((depths < ZOO[name].layers).sum())
        if 2 <= early <= 6:
            return staged, given(staged, inputs)
        low, high = (low, middle) if early > 6 else (middle, high)
    raise AssertionError("no threshold parts the rows")


@pytest.mark.parametrize(
    ("name", "rule", "before"),
    [
        ("vit", "entropy", ""),
        ("vit", "convergence", ""),
        ("minilm", "convergence", ""),
        ("siglip", "entropy", ""),
        ("vit", "entropy", "tome{r=4}"),
    ],
)
def test_an_artifact_gives_row_by_row_what_it_gives_a_batch(
    name: str, rule: str, before: str, tmp_path: Path
) -> None:
    """The staged runs agree with each other, with the exported programs, and with one file in bare ONNX Runtime."""
    staged, inputs = split_rows(name, rule, before)
    wanted = staged.staged(inputs)
    path = tokopt.export(staged, tmp_path / "staged.tokopt")
    model = load(path)
    feed = {key: value.numpy() for key, value in inputs.items()}
    batch = model.run(**feed)
    assert batch.depths is not None and len(set(batch.depths.tolist())) > 1
    np.testing.assert_array_equal(batch.depths, wanted.depths.numpy())
    assert np.bincount(batch.depths).sum() == len(batch.depths)
    assert set(batch.depths.tolist()) <= set(model.depths)
    whole = model.manifest.schedule.whole
    session = onnxruntime.InferenceSession(path / model.manifest.programs[whole].files["onnx"])
    *names, depth = [output.name for output in session.get_outputs()]
    for row in range(len(batch.depths)):
        one = {key: value[row : row + 1] for key, value in feed.items()}
        alone = model.run(**one)
        *bare, left = (np.asarray(value) for value in session.run([*names, depth], one))
        assert alone.depths.tolist() == left.tolist() == [batch.depths[row]]
        for key, array in zip(names, bare, strict=True):
            close(ZOO[name], inputs, key, row, alone[key], batch[key][row : row + 1])
            close(ZOO[name], inputs, key, row, array, alone[key])
            close(ZOO[name], inputs, key, row, alone[key], wanted.outputs[key][row : row + 1].numpy())
    assert tokopt.verify(path).ok


def close(entry: Entry, inputs: Any, name: str, row: int, got: np.ndarray, want: np.ndarray) -> None:
    """The NMSE of a row, where nothing is padding."""
    assert got.shape == want.shape, name
    if entry.mask and want.ndim == 3:
        real = inputs[entry.mask][row].bool().numpy()
        got, want = got[:, real], want[:, real]
    error = np.square(got.astype(float) - want).mean() / np.square(want.astype(float)).mean()
    assert error < 1e-9, name


@pytest.mark.parametrize("name", [name for name in MODELS if ZOO[name].layers > 2])
def test_every_depth_can_be_asked_for(name: str, tmp_path: Path) -> None:
    staged, inputs = split_rows(name, "convergence")
    model = load(tokopt.export(staged, tmp_path / "staged.tokopt"))
    feed = {key: value.numpy() for key, value in inputs.items()}
    assert model.depths == (1, 2, ZOO[name].layers)
    for depth in model.depths:
        made = model.run(**feed, depth=depth)
        wanted = staged.staged(inputs, depth=depth)
        assert set(made.depths.tolist()) == {depth}
        for key, want in wanted.outputs.items():
            for row in range(len(made.depths)):
                close(ZOO[name], inputs, key, row, made[key][row : row + 1], want[row : row + 1].numpy())


def test_names_of_stages_and_notes_are_in_the_manifest(tmp_path: Path) -> None:
    staged, _ = split_rows("vit", "entropy")
    manifest = load(tokopt.export(staged, tmp_path / "staged.tokopt")).manifest
    assert [entry.depth for entry in manifest.schedule.entries] == [1, 2, 3]
    assert re.fullmatch(r"exit\{after=\[1,2\] threshold=[\d.]+ fit=own\}", manifest.pipeline)
