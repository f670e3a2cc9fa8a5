"""Results that are arguments, arguments given twice, TorchScript, samples by name, and dtypes raised foreign errors.

The law: whatever tensors a model takes and returns, artifacts of both targets take them by distinct names and return
them; what cannot be captured or calibrated with is refused in one sentence that says what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import BatchEncoding

import tokopt
from tests.zoo.decoders import CONTEXT, VOCABULARY, HandRotary, HandWritten
from tokopt.analysis.samples import tensors_of
from tokopt.errors import CaptureError, InputError, LoweringError
from tokopt.frontend.language import capture_lm
from tokopt.ir.bundle import Bundle
from tokopt.runtime import Generation, load

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class Returns(nn.Module):
    """Gives what a function makes of itself and its input."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(8, 8)
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Masked(nn.Module):
    """Gives its mask back by the name that it came in with."""

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"x": x * mask, "mask": mask}


class Sum(nn.Module):
    """A weighted sum of two tensors."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return 2 * a + b


class Nested(nn.Module):
    """Takes ``a["b"]`` and ``a_b``, both of which could be called ``a_b``; gives what the graph inside is called."""

    def forward(self, a: dict[str, Tensor], a_b: Tensor) -> dict[str, Tensor]:
        return {"val_0": 2 * a["b"] + a_b, "add": a_b}


CASES: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
    "input": (Returns(lambda model, x: (model.linear(x), x)), (X,)),
    "input alone": (Returns(lambda _, x: x), (X,)),
    "twice": (Returns(lambda model, x: (model.linear(x),) * 2 + (x, x)), (X,)),
    "parameters": (Returns(lambda model, x: (model.table, x + 1, model.linear.weight, model.table)), (X,)),
    "no-ops": (Returns(lambda _, x: (x * 1, x.view(x.shape), x.contiguous(), x.float())), (X,)),
    "name of an input": (Masked(), (X, torch.ones(3, 5, 1))),
    "one tensor for two": (Sum(), (X, X)),
    "names inside": (Nested(), ({"b": X}, X + 1)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", ["onnx", "torch"])
def test_artifacts_give_what_the_model_gives(case: str, target: str, tmp_path: Path) -> None:
    model, args = CASES[case]
    bundle = tokopt.capture(model, args)
    names = [spec.name for spec in (*bundle.main.inputs, *bundle.main.outputs)]
    assert len(set(names)) == len(names)
    tokopt.export(bundle, tmp_path / "a", target=target)
    given = tree_leaves(args)
    if target == "onnx":
        got = list(load(tmp_path / "a").run(*(x.numpy() for x in given)).values())
    else:
        got = [x.numpy(force=True) for x in tokopt.open_bundle(tmp_path / "a")(*given)]
    for have, want in zip(got, tree_leaves(model(*args)), strict=True):
        np.testing.assert_allclose(have, want.numpy(force=True), rtol=1e-5, atol=1e-6)


def test_a_pass_leaves_what_is_returned(tmp_path: Path) -> None:
    model = Returns(lambda model, x: (model.linear(x), x))
    made = tokopt.optimize(tokopt.capture(model, (X,)), "int8", strict=True)
    tokopt.export(made, tmp_path / "a")
    assert np.array_equal(load(tmp_path / "a")(X.numpy())["output_1"], X.numpy())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "model",
    [
        lambda: torch.jit.script(nn.Linear(8, 8)),
        lambda: torch.jit.trace(nn.Linear(8, 8), (X,)),
        lambda: nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.ReLU()),
    ],
    ids=["scripted", "traced", "inside"],
)
def test_torchscript_is_refused(model: Callable[[], nn.Module]) -> None:
    with pytest.raises(CaptureError, match="cannot trace TorchScript; capture"):
        tokopt.capture(model(), (X,))


@pytest.mark.parametrize(
    "made", [lambda x: torch.view_as_complex(x.unflatten(-1, (-1, 2))), lambda x: x.to(torch.float8_e5m2)]
)
def test_dtypes_that_no_artifact_holds_are_refused(made: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match="which no artifact can hold; convert it inside"):
        tokopt.capture(Returns(lambda _, x: made(x)), (X,))


def test_bfloat16_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model = HandWritten(hidden=32, heads=2, layers=1).bfloat16()
    with pytest.raises(CaptureError, match=r"computes in bfloat16.*capture it in float32 \(model.float\(\)"):
        capture_lm(model, generation=Generation(CONTEXT, VOCABULARY))
    encoder = tokopt.capture(nn.Linear(8, 8).bfloat16(), (X.bfloat16(),))
    with pytest.raises(LoweringError, match=r"capture the model in float32 \(model.float\(\)\)"):
        tokopt.export(encoder, tmp_path / "a")


@cache
def decoder() -> Bundle:
    torch.manual_seed(0)
    model = HandRotary(hidden=32, heads=2, layers=1).eval().requires_grad_(False)
    return capture_lm(model, generation=Generation(CONTEXT, VOCABULARY))


IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize(
    "calibration",
    [
        BatchEncoding(
            {"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
        ),
        [{"input_ids": IDS, "attention_mask": [1] * 8}],
        iter([{"tokens": np.array(IDS)}]),
        [{"input_ids": torch.tensor([IDS], dtype=torch.int32)}],
    ],
    ids=["BatchEncoding", "dict", "own name", "int32"],
)
def test_a_text_by_name_is_the_text(calibration: Any) -> None:
    made, wanted = (
        tokopt.optimize(decoder(), "gptq{group=16}", calibration=samples) for samples in (calibration, [IDS])
    )
    tokens = torch.tensor([IDS])
    assert torch.equal(made(tokens)[0], wanted(tokens)[0])


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ({"token_type_ids": [[0] * 8]}, "has token_type_ids, the model takes tokens"),
        ({"input_ids": [[1, 2], [3]]}, "no array of numbers"),
        ("a text", "the bundle has no tokenizer to read text with"),
        ([0.5, 1.5], "give token ids below"),
    ],
)
def test_what_is_no_text_is_refused(sample: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        list(tensors_of(decoder(), sample))


def test_samples_of_an_encoder_have_its_dtypes() -> None:
    bundle = tokopt.capture(nn.Linear(8, 8), (X,))
    nameless: Any = {"input": object()}
    assert next(tensors_of(bundle, {"input": X.double().numpy()}))["input"].dtype == torch.float32
    with pytest.raises(InputError, match="which is float32"):
        next(tensors_of(bundle, X.long()))
    with pytest.raises(InputError, match="'input' that is no array of numbers"):
        next(tensors_of(bundle, nameless))
