"""The experts of mixtures stayed in float32 while the report said that the model was quantized, and routers did not.

The law: of every weight that a product reads, a pass that quantizes or casts linear layers changes it, or names it in a
refusal, so that ``strict`` fails. Routers stay as they are, since rounding would choose other experts; they, embeddings
and convolutions stand in a note.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import MixtralConfig, MixtralForCausalLM

import tokopt
from tokopt.errors import PassRefused
from tokopt.ir.bundle import AppliedPass, Bundle
from tokopt.kernels import ops

WIDTH, EXPERTS = 32, 4
X = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))
PASSES = ("rtn{group=16}", "int8", "cast")


class Mixture(nn.Module):
    """A residual linear, and the two best of several experts; a function says how they are computed."""

    def __init__(self, experts: Callable[[Mixture, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = experts
        self.before, self.router = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.before(x)
        scores, chosen = self.router(x).softmax(-1).topk(2)
        return x + self.function(self, x, torch.zeros(*x.shape[:2], EXPERTS).scatter(-1, chosen, scores))


def all_of_them(model: Mixture, x: Tensor, gates: Tensor) -> Tensor:
    return torch.einsum("bte,btc,ecd->btd", gates, x, model.experts)


def the_chosen(model: Mixture, x: Tensor, gates: Tensor) -> Tensor:
    """The weights of every token's best expert are gathered."""
    weights = model.experts[gates.flatten(0, 1).argmax(-1)]
    return torch.bmm(x.flatten(0, 1)[:, None], weights).reshape(x.shape)


@cache
def mixture(experts: Callable[[Mixture, Tensor, Tensor], Tensor]) -> Bundle:
    return tokopt.capture(Mixture(experts), (X,))


def applied(bundle: Bundle, text: str) -> AppliedPass:
    return tokopt.optimize(bundle, text).history[-1]


@pytest.mark.parametrize("text", PASSES)
@pytest.mark.parametrize("experts", [all_of_them, the_chosen])
def test_experts_are_named_and_strict_fails(experts: Any, text: str) -> None:
    done = applied(mixture(experts), text)
    assert done.matches == 1
    assert any(note.startswith("experts: ") and "no linear layer" in note for note in done.notes), done.notes
    with pytest.raises(PassRefused, match="experts: "):
        tokopt.optimize(mixture(experts), text, strict=True)
    skipping = text.replace("cast", "cast{}").replace("int8", "int8{}").replace("}", ' skip=["experts"]}')
    tokopt.optimize(mixture(experts), skipping, strict=True)  # what the user leaves out is no surprise


@pytest.mark.parametrize("text", PASSES)
def test_the_router_is_left_alone_and_noted(text: str) -> None:
    made = tokopt.optimize(mixture(all_of_them), text)
    assert any("the router router" in note for note in made.history[-1].notes)
    weights = dict(made.main.module.named_parameters())
    router = next(value for name, value in weights.items() if name.endswith("router.weight"))
    assert router.dtype == torch.float32
    before = mixture(all_of_them).main.module
    assert torch.equal(router, dict(before.named_parameters())["model.router.weight"])


@pytest.mark.parametrize("text", PASSES)
def test_a_language_model_of_experts(text: str) -> None:
    """Weights in fewer bits are those of experts, too; other passes name what they leave."""
    config = MixtralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    bundle = tokopt.capture_lm(MixtralForCausalLM(config).eval())
    done = applied(bundle, text)
    experts = ["down_proj", "gate_up_proj"]
    named = [note for note in done.notes if "no linear layer" in note]
    assert done.matches == 5 + 2 * (text == "rtn{group=16}")  # attention, the output projection, and experts
    assert sorted(note.split(": ")[0].rpartition(".")[2] for note in named) == (
        experts if done.matches == 5 else []
    )
    assert any("the router" in note for note in done.notes)


class Calls(nn.Module):
    """Calls a function of its parts and its input."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (
            Calls(lambda m, x: m.recurrent(x)[0], recurrent=nn.LSTM(WIDTH, 16, batch_first=True)),
            "recurrent.weight",
        ),
        (Calls(lambda m, x: m.left @ x.transpose(1, 2), left=weight(16, WIDTH)), "left"),
        (Calls(lambda m, x: F.bilinear(x, x, m.both), both=weight(4, WIDTH, WIDTH)), "both"),
    ],
    ids=["recurrent", "on the left", "bilinear"],
)
def test_other_products_are_named(model: nn.Module, path: str) -> None:
    with pytest.raises(PassRefused, match=f"{path}.*is no linear layer"):
        tokopt.optimize(tokopt.capture(model, (X,)), "rtn{group=16}", strict=True)


@pytest.mark.parametrize(
    "model",
    [
        Calls(
            lambda m, x: F.linear(x, m.full + m.up @ m.down),
            full=weight(16, WIDTH),
            up=weight(16, 2),
            down=weight(2, WIDTH),
        ),
        Calls(lambda m, x: m.normed(x), normed=weight_norm(nn.Linear(WIDTH, 16))),
        Calls(
            lambda m, x: F.linear(x, torch.cat([m.one, m.two])), one=weight(8, WIDTH), two=weight(8, WIDTH)
        ),
    ],
    ids=["low-rank addition", "weight norm", "joined"],
)
def test_weights_that_are_computed_from_parameters_are_quantized(model: nn.Module) -> None:
    bundle = tokopt.capture(model, (X,))
    made = tokopt.optimize(bundle, "rtn{bits=8 group=16}", strict=True)
    assert [node.target for node in made.main.module.graph.nodes].count(ops.dequantize_weight.default) == 1
    assert not any("no linear layer" in note for note in made.history[-1].notes)
    torch.testing.assert_close(made(X)[0], bundle(X)[0], rtol=0.1, atol=0.1)


def test_embeddings_and_convolutions_are_noted_and_strict_passes() -> None:
    def forward(model: Any, images: Tensor) -> Tensor:
        patches = model.patches(images).flatten(2).transpose(1, 2)
        return model.linear(patches + model.table(torch.arange(4)) + model.offset)

    parts = {
        "patches": nn.Conv2d(3, WIDTH, 8, 8),
        "table": nn.Embedding(4, WIDTH),
        "linear": nn.Linear(WIDTH, 8),
    }
    bundle = tokopt.capture(Calls(forward, offset=weight(4, WIDTH), **parts), (torch.randn(3, 3, 16, 16),))
    done = tokopt.optimize(bundle, "rtn", strict=True).history[-1]
    assert done.notes[-1] == "left in float: 0.00051 MB of embeddings, 0.025 MB of convolutions"


def test_a_head_whose_classes_are_ranked_is_no_router() -> None:
    model = Calls(lambda m, x: m.head(x).topk(2).indices, head=nn.Linear(WIDTH, 16))
    assert tokopt.optimize(tokopt.capture(model, (X,)), "rtn", strict=True).history[-1].matches == 1
