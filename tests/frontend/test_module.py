"""Capture keeps the model's numbers, normalises its attention, and explains in one sentence what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import tokopt
from tests.matrix.test_matrix import captured
from tests.zoo import ZOO
from tokopt.analysis.blocks import find_sites
from tokopt.errors import CaptureError, InputError
from tokopt.ir.graph import aten, is_call
from tokopt.ir.program import AxisRange

AVAILABLE = [name for name, entry in ZOO.items() if entry.available]


@pytest.mark.parametrize("name", AVAILABLE)
def test_a_captured_model_computes_what_the_model_does(name: str) -> None:
    """At other sizes of every named axis than the captured ones."""
    entry, bundle = ZOO[name], captured(name)
    model = entry.build()
    tokens = bundle.main.ranges.get("tokens")
    longer = {} if tokens is None else {"tokens": entry.tokens + 5}
    for inputs in (entry.inputs(batch=1), entry.inputs(batch=3, **longer)):
        with torch.no_grad():
            wanted = tree_leaves(model(**inputs))
        for got, expected in zip(bundle(*inputs.values()), wanted, strict=True):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["explicit_softmax", "mha", "siglip", "vit", "bert"])
def test_every_attention_is_sdpa_after_capture(name: str) -> None:
    """No softmax is left, and a mask that hides nothing is gone."""
    entry = ZOO[name]
    graph = captured(name).main.module.graph
    assert not [n for n in graph.nodes if is_call(n, aten.softmax, aten._softmax)]
    sites = find_sites(graph)
    assert [s.kind for s in sites].count("self") == entry.layers
    assert all((s.mask is not None) == (entry.mask is not None) for s in sites)


class Scores(nn.Module):
    """Hand-written attentions whose logits are built in different ways."""

    def __init__(self, logits) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.logits = logits
        self.bias = nn.Parameter(torch.randn(7, 7))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(*x.shape[:2], 3, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = self.logits(self, q, k).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(x.shape)


FORMS = {
    "scaled": lambda m, q, k: q @ k.transpose(-1, -2) * 0.5,
    "divided": lambda m, q, k: q @ k.mT / 2.0,
    "query scaled": lambda m, q, k: (q * 0.5) @ k.transpose(2, 3),
    "bias": lambda m, q, k: m.bias + q @ k.mT / 2.0,
    "scaled bias": lambda m, q, k: (q @ k.mT + m.bias) * 0.5,
    "two biases": lambda m, q, k: (q @ k.mT + m.bias) * 0.5 + m.bias.T,
    "masked": lambda m, q, k: (q @ k.mT / 2).masked_fill(m.bias > 1, float("-inf")),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_softmax_chains_are_recognised_whatever_their_form(form: str) -> None:
    torch.manual_seed(1)
    model, x = Scores(FORMS[form]).eval(), torch.randn(2, 7, 12)
    bundle = tokopt.capture(model, (x,))
    assert len(find_sites(bundle.main.module.graph)) == 1
    torch.testing.assert_close(bundle(x)[0], model(x), atol=1e-6, rtol=1e-5)


def test_attention_weights_that_are_used_elsewhere_are_left_alone() -> None:
    class Returned(Scores):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = (t.view(*x.shape[:2], 3, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            weights = self.logits(self, q, k).softmax(-1)
            return weights @ v, weights

    bundle = tokopt.capture(Returned(FORMS["scaled"]), (torch.randn(2, 7, 12),))
    assert not find_sites(bundle.main.module.graph)


def test_capture_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    tokopt.capture(model, (torch.randn(2, 4),))
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_exported_programs_and_pt2_files_are_captured(tmp_path: Path) -> None:
    """A ``.pt2`` brings its own example inputs."""
    entry = ZOO["vit"]
    inputs = entry.inputs()
    exported = torch.export.export(
        entry.build(), (), inputs, dynamic_shapes={"pixel_values": {0: torch.export.Dim("b")}}
    )
    torch.export.save(exported, tmp_path / "vit.pt2")
    for source in (exported, tmp_path / "vit.pt2"):
        bundle = tokopt.capture(source)
        wanted = tree_leaves(entry.build()(**inputs))
        for got, expected in zip(bundle(*inputs.values()), wanted, strict=True):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_names_come_from_the_model() -> None:
    program = captured("bert").main
    assert [s.name for s in program.inputs] == ["input_ids", "attention_mask"]
    assert program.inputs[0].axes == ("batch", "tokens")
    assert [(s.name, s.axes) for s in program.outputs] == [
        ("last_hidden_state", ("batch", "tokens", 48)),
        ("pooler_output", ("batch", 48)),
    ]


def test_bounds_that_the_model_sets_are_taken_over() -> None:
    """BERT has 64 positions; a user's own bound is kept when it is tighter."""
    entry = ZOO["bert"]
    assert captured("bert").main.ranges["tokens"].max == 64
    mine = {"tokens": AxisRange(3, 40)}
    program = tokopt.capture(entry.build(), (), entry.inputs(), dynamic=entry.dynamic, ranges=mine).main
    assert program.ranges["tokens"] == AxisRange(3, 40)


class Placed(nn.Module):
    """Adds a table of 12 positions to tokens [batch, tokens, channels]."""

    def __init__(self, even: bool = False) -> None:
        super().__init__()
        self.table, self.even = nn.Parameter(torch.randn(12, 4)), even

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens + self.table[: tokens.shape[1]]
        return x.unflatten(1, (-1, 2)).mean(2) if self.even else x


@pytest.mark.parametrize("even", [False, True])
def test_a_model_that_sets_bounds_is_exported_once(even: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within them it computes what the model does; one that asks for more of a size is refused."""
    calls, export, model = list[object](), torch.export.export, Placed(even).eval()
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: (calls.append(a), export(*a, **k))[1])
    dynamic, example = {"tokens": ("batch", "tokens", None)}, (torch.randn(3, 6, 4),)
    if even:
        with pytest.raises(
            CaptureError, match=r"axis 'tokens' dynamic: it fits only multiples of 2, .* leave 'tokens'"
        ):
            tokopt.capture(model, example, dynamic=dynamic)
        return
    bundle = tokopt.capture(model, example, dynamic=dynamic)
    assert len(calls) == 1 and bundle.main.ranges["tokens"] == AxisRange(1, 12)
    for count in (1, 5, 12):
        tokens = torch.randn(2, count, 4)
        assert torch.equal(bundle(tokens)[0], model(tokens))


class Packed(nn.Module):
    """Patches of pictures of given sizes [pictures, 2], each with its place in its picture."""

    def __init__(self, held: bool) -> None:
        super().__init__()
        self.places, self.held = nn.Embedding(64, 4), held

    def forward(self, patches: Tensor, sizes: Tensor | None = None) -> Tensor:
        if self.held:
            sizes = torch.tensor([[2, 3], [1, 2]])
        assert sizes is not None
        places = torch.cat([torch.arange(high * wide) for high, wide in sizes.tolist()])
        starts = torch.repeat_interleave(sizes.prod(-1).cumsum(0), sizes.prod(-1))
        return patches + self.places(places + starts)


def test_what_follows_from_numbers_in_the_model_is_computed_at_capture() -> None:
    """Values of an input are not known, and are refused as before."""
    model, patches = Packed(held=True).eval(), torch.randn(3, 8, 4)
    bundle = tokopt.capture(model, (patches,))
    for batch in (1, 5):
        x = torch.randn(batch, 8, 4)
        assert torch.equal(bundle(x)[0], model(x))
    with pytest.raises(
        CaptureError, match=r"decides by the values of its inputs|a size of the values of its inputs"
    ):
        tokopt.capture(Packed(held=False).eval(), (patches, torch.tensor([[2, 3], [1, 2]])), dynamic={})


class Fixed(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(4, -1)


class Branch(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images if images.sum() > 0 else -images


class Broken(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        raise KeyError("no such weight")


@pytest.mark.parametrize(
    ("model", "args", "options", "error", "sentence"),
    [
        (Fixed(), (torch.randn(4, 6),), {}, CaptureError, "axis 'batch'"),
        (Branch(), (torch.randn(4, 6),), {}, CaptureError, "Branch cannot be captured"),
        (Broken(), (torch.randn(4, 6),), {}, CaptureError, "fails on the example inputs: KeyError"),
        (Fixed(), (), {}, CaptureError, "needs example inputs"),
        (Fixed(), (torch.randn(0, 6),), {}, InputError, "at least 1"),
        (Fixed(), (torch.randn(4, 6),), {"dynamic": {"picture": {0: "batch"}}}, InputError, "'picture'"),
        (Fixed(), (torch.randn(4, 6),), {"dynamic": {"images": {3: "batch"}}}, InputError, "axis 3"),
        (3, (torch.randn(4, 6),), {}, CaptureError, "cannot capture a int"),
        ("nowhere.pt2", (), {}, CaptureError, "no such file"),
    ],
)
def test_what_cannot_be_captured_is_said_in_one_sentence(model, args, options, error, sentence) -> None:
    with pytest.raises(error, match=sentence) as caught:
        tokopt.capture(model, args, **options)
    assert "\n" not in str(caught.value)


def test_a_damaged_pt2_file_is_a_capture_error(tmp_path: Path) -> None:
    (tmp_path / "bad.pt2").write_bytes(b"not a zip file")
    with pytest.raises(CaptureError, match=r"not a readable \.pt2"):
        tokopt.capture(tmp_path / "bad.pt2")
