"""Models that ``capture_lm`` cannot take ended in raw AttributeErrors, at export, or in 600 characters of guards.

The law: what cannot be captured is refused by ``capture``, in one sentence that says why and what to do.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokopt
from tests.zoo import ZOO
from tests.zoo.decoders import HandRotary
from tokopt.errors import CaptureError
from tokopt.frontend.language import capture_lm
from tokopt.runtime import Generation

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def decoder(name: str, kind: str = "ForCausalLM", **settings: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{"vocab_size": VOCABULARY, **settings})
    return getattr(transformers, name + kind)(config).eval()


T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Mamba": (
        "ForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "no attention cache",
    ),
    "Rwkv": ("ForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2}, "no attention cache"),
    "Bert": ("ForMaskedLM", SIZES, "no attention cache"),
    "OpenAIGPT": ("LMHeadModel", GPT, "no attention cache"),
    "Bart": ("ForConditionalGeneration", {"d_model": 32}, "encoder-decoder.*get_encoder"),
    "RecurrentGemma": ("ForCausalLM", {**SIZES, "num_hidden_layers": 3}, "keeps a recurrent state"),
    "T5": ("ForConditionalGeneration", T5, "encoder-decoder.*get_encoder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_language_models_that_cannot_be_captured_are_refused_in_one_sentence(name: str) -> None:
    """Also when a generation is given, as another refusal asks for."""
    kind, settings, reason = REFUSED[name]
    for generation in (None, Generation(context=64, vocabulary=VOCABULARY)):
        with pytest.raises(CaptureError, match=f"^{name}.*{reason}") as caught:
            capture_lm(decoder(name, kind, **settings), generation=generation)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_a_configuration_without_a_context_asks_for_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with one the model is captured."""
    made = decoder("Llama", **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config: Any = made.config
    context = config.max_position_embeddings
    del config.max_position_embeddings
    monkeypatch.delattr(type(config), "max_position_embeddings")
    with pytest.raises(CaptureError, match=r"does not say its context.*pass generation=Generation\("):
        capture_lm(made)
    assert capture_lm(made, generation=Generation(context, VOCABULARY)).main.ranges["tokens"].max == context


class Complex(HandRotary):
    """The rotary embeddings of the first Llama."""

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        pairs = x.shape[-1] // 2
        angles = positions[:, None, :, None] * 100.0 ** (-torch.arange(pairs) / pairs)
        turned = torch.view_as_complex(x.unflatten(-1, (pairs, 2)).contiguous()) * torch.polar(
            torch.ones(()), angles
        )
        return torch.view_as_real(turned).flatten(-2)


class Transformed(HandRotary):
    """A decoder that no engine can compute."""

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        return torch.fft.fft(x).real


def test_complex_rotary_embeddings_are_computed_in_real_numbers_and_other_complex_numbers_refused() -> None:
    torch.manual_seed(0)
    model = Complex().eval()
    step = capture_lm(model, generation=Complex.generation).main
    assert not any(
        value.is_complex()
        for node in step.module.graph.nodes
        if isinstance(value := node.meta.get("val"), Tensor)
    )
    with pytest.raises(CaptureError, match="complex numbers"):
        capture_lm(Transformed().eval(), generation=Transformed.generation)


def siglip2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    inputs = {
        "pixel_values": torch.randn(2, 24, 48),
        "pixel_attention_mask": torch.ones(2, 24, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[4, 6], [4, 6]]),
    }
    return Siglip2VisionModel(Siglip2VisionConfig(**sizes, patch_size=4, num_patches=36)).eval(), inputs


class Cropped(nn.Module):
    """Sizes from values, in two other ways."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        return x[:, : int(length)] if self.by == "number" else x[:, x.sum((0, 2)) > 0]


@pytest.mark.parametrize("dynamic", [None, {}])
def test_sizes_made_from_values_are_refused_in_one_sentence(dynamic: dict[str, Any] | None) -> None:
    x = {"x": torch.randn(2, 6, 4), "length": torch.tensor(3)}
    for model, inputs in (siglip2(), (Cropped("number"), x), (Cropped("mask"), x)):
        with pytest.raises(CaptureError) as caught:
            tokopt.capture(model, (), inputs, dynamic=dynamic)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


class Scaled(nn.Module):
    """A number, not a size, made from a value."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale.item()


def test_numbers_made_from_values_are_captured() -> None:
    x = torch.randn(2, 3)
    bundle = tokopt.capture(Scaled(), (x, torch.tensor(2.0)), dynamic={})
    torch.testing.assert_close(bundle(x, torch.tensor(3.0))[0], 3 * x)


def test_numbers_made_from_values_are_no_part_of_what_is_traced_later() -> None:
    """Graphs with the same axes share symbols, so a pass on another model failed."""
    x = torch.randn(2, 3)
    tokopt.optimize(tokopt.capture(Scaled(), (x, torch.tensor(2.0)), dynamic={}), "int8")
    entry = ZOO["vit"]
    bundle = tokopt.capture(entry.build(), (), entry.inputs(), dynamic={})
    assert tokopt.optimize(bundle, "tome{r=2}").history[-1].matches
