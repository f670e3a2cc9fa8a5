"""What capture does for decoders that are written in ways of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tokopt
from tokopt.errors import CaptureError
from tokopt.frontend.experts import experts_as_ops
from tokopt.frontend.language import capture_lm
from tokopt.frontend.sight import Sight


@pytest.mark.parametrize("sight", [Sight(), Sight(window=3), Sight(chunk=4)])
def test_a_layer_sees_by_positions_not_by_slots(sight: Sight) -> None:
    """Slots in any order, free ones and padding between them; new tokens at the end."""
    positions, length = [[7, 8, 9]], 6
    held = torch.tensor([[3, -1, 6, 0, 5, 4, *positions[0], -1]])[:, None, :, None]
    own = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    mask = sight.mask(held, torch.tensor(positions), own, torch.tensor([length]))

    def seen(new: int, slot: int) -> bool:
        key = int(held[0, 0, slot, 0])
        near = not sight.window or new - key < sight.window
        together = not sight.chunk or new // sight.chunk == key // sight.chunk
        return 0 <= key <= new and near and together

    assert mask[0, 0].tolist() == [[seen(new, slot) for slot in range(10)] for new in positions[0]]


def test_a_text_read_at_once_is_seen_as_through_the_cache() -> None:
    rows, own = torch.arange(9), torch.ones(1, 9, 9, dtype=torch.bool).tril()
    for sight in (Sight(), Sight(window=4), Sight(chunk=3)):
        through = sight.mask(rows[None, None, :, None], rows[None], own, torch.tensor([0]))
        assert torch.equal(sight.causal(rows), through[0, 0])


def test_experts_without_a_loop_give_what_the_model_gives() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=5,
    )
    model = MixtralForCausalLM(config).eval()
    ids, before = torch.randint(97, (2, 11)), model.config._experts_implementation
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        with experts_as_ops(model):
            torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
            assert model.config._experts_implementation != before
    assert model.config._experts_implementation == before


class OneKey(nn.Module):
    """Keys and values of one head, which SDPA broadcasts over the heads of queries."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (4, -1)).transpose(1, 2)
        return functional.scaled_dot_product_attention(heads, heads[:, :1], heads[:, 1:2])


def test_keys_of_one_head_are_shared() -> None:
    x = torch.randn(3, 7, 32)
    bundle = tokopt.capture(OneKey(), (x,))
    attention = next(n for n in bundle.main.module.graph.nodes if "scaled_dot" in str(n.target))
    assert attention.kwargs["enable_gqa"] is True
    torch.testing.assert_close(bundle(x)[0], OneKey()(x))


def test_a_model_that_cannot_be_told_positions_is_refused_in_one_plain_sentence() -> None:
    """RoFormer's rotary embeddings know no axis of rows; what it raised is the cause."""
    from transformers import RoFormerConfig, RoFormerForCausalLM

    small = RoFormerConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
    )
    sentence = (
        r"RoFormerForCausalLM does not run with positions, a mask and a cache that are given to it "
        r"\(at modeling_roformer.py:\d+\), so there is no step to capture; make it compute with those, or capture it "
        "whole with tokopt.capture$"
    )
    with pytest.raises(CaptureError, match=sentence) as caught:
        capture_lm(RoFormerForCausalLM(small).eval())
    assert isinstance(caught.value.__cause__, RuntimeError)
