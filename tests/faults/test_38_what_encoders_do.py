"""What single encoders of transformers do: each of these ended in an error that is not tokopt's, or in other numbers.

The law: a model is computed as it is, or refused in one sentence of tokopt's that says what to do.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tokopt
from tokopt.errors import CaptureError, InputError
from tokopt.ir.bundle import Bundle
from tokopt.runtime import load

X = torch.randn(5, 6, 32, generator=torch.Generator().manual_seed(1))


def computed(model: nn.Module, folder: Path, text: str = "", x: Tensor = X) -> tuple[Bundle, Tensor]:
    """The bundle of a model, and what its artifact gives."""
    bundle = tokopt.capture(model, (x,))
    bundle = tokopt.optimize(bundle, text, strict=True) if text else bundle
    tokopt.export(bundle, folder / "a")
    (got,) = load(folder / "a").run(x.numpy()).values()
    return bundle, torch.from_numpy(got)


class Epsilon(nn.Module):
    """Keeps a division from zero (I-BERT), and a factor that is nearly one."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs() + 1e-12) * (1 + 2**-18)


def test_what_is_nearly_nothing_is_computed(tmp_path: Path) -> None:
    x = X * (X > 0)
    _, got = computed(Epsilon(), tmp_path, x=x)
    assert torch.equal(got, Epsilon()(x)) and float(got.max()) > 1


class Halves(nn.Module):
    """Sums of the equal parts of two tensors (WavLM)."""

    def forward(self, x: Tensor) -> Tensor:
        (a, b), (c, d) = x.chunk(2, -1), x.exp().chunk(2, -1)
        return torch.cat([a + c, b + d], -1)


def test_sums_of_equal_parts(tmp_path: Path) -> None:
    torch.testing.assert_close(computed(Halves(), tmp_path)[1], Halves()(X))


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_a_linear_on_a_linear_is_quantized(activations: str, tmp_path: Path) -> None:
    """Nothing stands between them (ALBERT)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 32)).eval()
    bundle = tokopt.capture(model, (X,))
    made = tokopt.optimize(bundle, f"int8{{activations={activations}}}", calibration=[(X,)], strict=True)
    assert made.history[-1].matches == 2
    tokopt.export(made, tmp_path / "a")
    error = (torch.from_numpy(load(tmp_path / "a").run(X.numpy())["output"]) - model(X)).square().mean()
    assert error < 1e-3 * model(X).square().mean()


class Checked(nn.Module):
    """Looks at its input's values, and computes the same of all (FlauBERT)."""

    def forward(self, x: Tensor) -> Tensor:
        torch._check((x > 9).sum(1).max().item() <= x.shape[1])
        return x * 2


def test_an_assert_on_values_is_not_computed(tmp_path: Path) -> None:
    assert torch.equal(computed(Checked(), tmp_path)[1], X * 2)


class Frames(nn.Module):
    """Rows of rows, which come out as rows (VideoPrism)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).flatten(0, 1)


def test_an_output_of_rows_times_something_is_tested_as_a_whole(tmp_path: Path) -> None:
    model = Frames().eval()
    bundle, got = computed(model, tmp_path, "int8")
    assert bundle.main.outputs[0].axes[0] == "6*batch"
    torch.testing.assert_close(got, bundle(X)[0], rtol=1e-4, atol=1e-4)


class Pair(nn.Module):
    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one.mean(1) @ other.mean(1).T


def test_an_axis_of_one_name_has_one_size() -> None:
    with pytest.raises(
        InputError, match="'batch' is 5 in 'one' and 3 in 'other'; give them names of their own"
    ):
        tokopt.capture(Pair(), (X, X[:3]))


class Alien(nn.Module):
    """What torch.export does not follow."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)


def test_what_is_not_followed_is_said_with_its_line() -> None:
    """In words of tokopt alone; what torch said is the error's cause."""
    sentence = (
        r"Alien cannot be captured \(at test_38_what_encoders_do.py:\d+\): torch.export does not follow what the model "
        "does there; write it in another way, or capture a part of the model without it$"
    )
    with pytest.raises(CaptureError, match=sentence) as caught:
        tokopt.capture(Alien(), (X,))
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None
