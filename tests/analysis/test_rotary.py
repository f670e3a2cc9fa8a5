"""Rotary embeddings read off the graph: the angles are those of the model's configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.matrix.language import bundle, model
from tests.zoo.decoders import GROUPED, _hugging_face
from tokopt.analysis.cache import cached_attentions
from tokopt.analysis.rotary import Rotary, rotaries
from tokopt.frontend.language import capture_lm
from tokopt.ir.bundle import Bundle


def found(made: Bundle) -> list[Rotary]:
    step = made.programs["step"]
    module = step.module
    return rotaries(step, module, cached_attentions(step, module, made.states))


def check(rotary: Rotary, frequencies: torch.Tensor) -> None:
    """Half-split pairs over the first channels, one for each frequency; the others are left alone."""
    pairs = len(frequencies)
    rest = range(2 * pairs, len(rotary.partners))
    assert rotary.partners == (*range(pairs, 2 * pairs), *range(pairs), *rest)
    wanted = torch.cat([-frequencies, frequencies, torch.zeros(len(rest))])
    torch.testing.assert_close(torch.tensor(rotary.angles), wanted, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("name", ("llama", "qwen2", "qwen3", "mistral", "gpt_neox", "phi"))
def test_angles_are_the_models_own(name: str) -> None:
    decoder: Any = model(name)
    for rotary in found(bundle(name)):
        check(rotary, decoder.get_decoder().rotary_emb.inv_freq)


def test_layers_have_angles_of_their_own() -> None:
    """Gemma 3's sliding layers turn faster than its full ones."""
    decoder: Any = model("gemma3")
    embeddings = decoder.get_decoder().rotary_emb
    sliding, full = found(bundle("gemma3"))
    check(sliding, embeddings.sliding_attention_inv_freq)
    check(full, embeddings.full_attention_inv_freq)
    assert sliding != full


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 80},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 40,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaled_angles(scaling: dict[str, Any]) -> None:
    """Stretched contexts: other frequencies, and with YaRN longer keys, which a rotation leaves long."""
    decoder: Any = _hugging_face("Llama", **GROUPED, rope_parameters={"rope_theta": 10_000.0, **scaling})()
    (rotary, _) = found(capture_lm(decoder))
    check(rotary, decoder.get_decoder().rotary_emb.inv_freq)


def test_neighbouring_channels() -> None:
    rotary = found(bundle("hand_rotary"))[0]
    assert rotary.partners == tuple(i ^ 1 for i in range(16))
    wanted = 100.0 ** (-torch.arange(8) / 8)
    torch.testing.assert_close(torch.tensor(rotary.angles[1::2]), wanted, rtol=2e-6, atol=0)


def test_rotations_add_up_and_their_mean_is_theirs() -> None:
    rotary = Rotary((2, 1, 0), (-0.7, 0.0, 0.7))
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    a, b = torch.arange(5).expand(2, -1), torch.arange(7, 2, -1).expand(2, -1)
    torch.testing.assert_close(
        rotary.rotate(rotary.rotate(x, a), b), rotary.rotate(x, a + b), rtol=0, atol=1e-6
    )
    every = torch.stack([rotary.rotate(x[:, 0], torch.full((2,), p)) for p in range(4, 9)]).mean(0)
    mean = rotary.mean(torch.arange(4, 9).expand(2, -1)).double()
    torch.testing.assert_close((mean @ x[:, 0, :, None])[..., 0], every, rtol=0, atol=1e-6)
