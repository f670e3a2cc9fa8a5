"""Phi-3 with ``rope_type=longrope`` was off by 1.9 in log-probability once a text passed the original length.

There the model turns the whole text by other frequencies; keys in a cache kept the short ones, a prefill across the
limit mixed both, and one long row changed its neighbours. The law: the context of a captured model ends where its
rotary frequencies change, up to there the step is the model's own, and capture says so.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from tokopt.errors import CaptureError
from tokopt.frontend.language import capture_lm
from tokopt.frontend.rope import fixed_frequencies, longest_fixed
from tokopt.runtime import Generation

ORIGINAL, CONTEXT, VOCABULARY = 10, 320, 97


def factors(rope_type: str) -> dict[str, Any]:
    longrope = {
        "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [4.0, 5.0, 6.0, 7.0],
    }
    return {
        "rope_type": rope_type,
        "rope_theta": 10000.0,
        **(longrope if rope_type == "longrope" else {"factor": 4.0}),
    }


def model(name: str, rope_parameters: dict[str, Any], **settings: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(
        **{
            **sizes,
            **special,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
        },
        **settings,
        rope_parameters=rope_parameters,
    )
    made = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in made.parameters():  # as it is, attention is the same everywhere
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    return made.eval()


def phi3() -> Any:
    return model("Phi3", factors("longrope"), original_max_position_embeddings=ORIGINAL)


def test_the_context_ends_where_the_frequencies_change() -> None:
    """Also for a model that has just read a long text, and has the frequencies of those; it is left as it was."""
    decoder, text = phi3(), torch.arange(ORIGINAL + 1)[None]
    with torch.no_grad():
        long = decoder(text).logits
    with pytest.warns(
        UserWarning, match=f"context of Phi3ForCausalLM is {ORIGINAL} positions instead of {CONTEXT}"
    ):
        bundle = capture_lm(decoder)
    assert bundle.generation is not None and bundle.generation.context == ORIGINAL
    assert bundle.main.ranges["tokens"].max == ORIGINAL
    assert bundle(text[:, :-1])[0].sub(long[:, :-1]).abs().max() > 0.01, "the frequencies do not matter here"
    with torch.no_grad():
        torch.testing.assert_close(
            bundle(text[:, :-1])[0], decoder(text[:, :-1]).logits, atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(decoder(text).logits, long)


def test_a_longer_context_is_refused() -> None:
    with pytest.raises(CaptureError, match=f"context of {CONTEXT} positions.*context={ORIGINAL}"):
        capture_lm(phi3(), generation=Generation(CONTEXT, VOCABULARY))


def test_frequencies_that_change_beyond_the_whole_context_are_captured_as_they_are() -> None:
    """``dynamic`` changes them beyond ``max_position_embeddings``, which is the context anyway."""
    decoder = model("Llama", factors("dynamic"))
    with torch.no_grad():
        decoder(torch.zeros(1, CONTEXT + 1, dtype=torch.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bundle = capture_lm(decoder)
    assert bundle.generation is not None and bundle.generation.context == CONTEXT


def test_one_kind_of_layers_alone_may_change() -> None:
    """Gemma 3 has rotary embeddings for each kind of layer."""
    kinds = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": factors("longrope"),
    }
    made = model("Gemma3Text", kinds, layer_types=list(kinds), sliding_window=7, head_dim=8)
    assert longest_fixed(made.config) == ORIGINAL
    text, fixed = torch.arange(ORIGINAL + 1)[None], made.model.rotary_emb.full_attention_inv_freq.clone()
    with torch.no_grad():
        long = made(text).logits
        assert not torch.equal(made.model.rotary_emb.full_attention_inv_freq, fixed)
        with fixed_frequencies(made):
            made(text)
            assert torch.equal(made.model.rotary_emb.full_attention_inv_freq, fixed)
        torch.testing.assert_close(made(text).logits, long)
