"""A model that counts positions by the length of its cache was captured, and generated wrong tokens after the prompt.

The check at capture read one text into an empty cache, where all positions are right: ``BartForCausalLM`` passed it.
The law: whatever a step is given (several calls, rows with padding before a text and within the cache), its logits are
the model's own for each text alone, or the model is refused.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.zoo.decoders import CONTEXT, VOCABULARY, HandWritten
from tokopt.errors import CaptureError
from tokopt.frontend.decoder import Cache
from tokopt.frontend.language import capture_lm


def transformers_model(name: str, **settings: object) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **settings)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


HEADS = {"decoder_attention_heads": 4, "decoder_ffn_dim": 48}
SMALL = {"d_model": 32, "decoder_layers": 2, "encoder_layers": 2, "max_position_embeddings": CONTEXT}


@pytest.mark.parametrize("name", ["Bart", "Pegasus"])
def test_models_that_count_positions_by_the_cache_are_told_them(name: str) -> None:
    """The check of what is captured reads several calls, with padding."""
    capture_lm(transformers_model(name, **SMALL, **HEADS))


def test_models_that_count_positions_in_a_way_of_their_own_are_refused() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48}
    with pytest.raises(CaptureError, match="CpmAntForCausalLM does not take position_ids"):
        capture_lm(transformers_model("CpmAnt", **sizes))


class FromZero(HandWritten):
    """Every call begins at position 0."""

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache, rows: Tensor) -> Tensor:
        here = torch.arange(tokens.shape[1]).expand_as(tokens)
        return super().forward(tokens, here, mask, cache, rows)


class Unmasked(HandWritten):
    """Padding is seen, as by a model that reads all its cache."""

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache, rows: Tensor) -> Tensor:
        seen = torch.arange(mask.shape[-1]) <= positions[..., None]
        return super().forward(tokens, positions, seen[:, None], cache, rows)


@pytest.mark.parametrize("kind", [FromZero, Unmasked])
def test_hand_written_decoders_are_checked_in_several_calls(kind: type[HandWritten]) -> None:
    with pytest.raises(CaptureError, match="does not follow the step"):
        capture_lm(kind().eval(), generation=HandWritten.generation)
