"""A mask computed from sizes alone was dropped where it hid nothing at three lengths near the example's.

ModernBERT's local window of 32 tokens hides nothing in a text of 8, and was gone at 100. The law: what capture leaves
out of a model is proved to do nothing at every size allowed, and what is captured computes what the model does there.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tokopt
from tokopt.analysis.blocks import find_sites
from tokopt.errors import CaptureError, InputError
from tokopt.ir.bundle import Bundle
from tokopt.ir.program import AxisRange

LONGEST = 256


def test_a_local_window_longer_than_the_example_is_kept() -> None:
    from transformers import ModernBertConfig, ModernBertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    special = dict.fromkeys(("bos_token_id", "cls_token_id"), 1) | dict.fromkeys(
        ("eos_token_id", "sep_token_id"), 2
    )
    config = ModernBertConfig(
        **sizes,
        **special,
        pad_token_id=0,
        num_attention_heads=4,
        local_attention=32,
        max_position_embeddings=LONGEST,
    )
    model = ModernBertModel(config).eval()
    text = torch.randint(3, 60, (2, 100))
    bundle = tokopt.capture(
        model,
        (),
        {"input_ids": text[:, :8].contiguous()},
        dynamic={"input_ids": ("batch", "tokens")},
        ranges={"tokens": AxisRange(2, LONGEST)},
    )
    with torch.no_grad():
        torch.testing.assert_close(bundle(text)[0], model(text)[0], atol=2e-5, rtol=1e-4)
    masks = [site.mask is not None for site in find_sites(bundle.main.module.graph)]
    assert masks == [False, True, True]


class Attention(nn.Module):
    """Attention over [batch, tokens, channels] with a mask made from sizes."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x, attn_mask=self.mask(x))


def distance(x: Tensor) -> Tensor:
    place = torch.arange(x.shape[1])
    return (place[:, None] - place).abs()


def lengths(x: Tensor, longest: int) -> Tensor:
    """Which tokens are there, from lengths that a model makes itself."""
    given = x.new_full((x.shape[0], 1), longest, dtype=torch.int64)
    return (torch.arange(x.shape[1]) < given)[:, None].expand(-1, x.shape[1], -1)


def additive(seen: Tensor) -> Tensor:
    return (1.0 - seen.float()) * torch.finfo(torch.float32).min


def in_place(x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    mask[:, 20:] = False
    return mask


HIDING: dict[str, Callable[[Tensor], Tensor]] = {
    "a window": lambda x: distance(x) <= 16,
    "a window, as a bias": lambda x: additive(distance(x) <= 16),
    "a bias that grows beyond a distance": lambda x: -0.5 * (distance(x) - 16).clamp(min=0).float(),
    "the first tokens": lambda x: lengths(x, 20),
    "chunks": lambda x: torch.arange(x.shape[1])[:, None] // 16 == torch.arange(x.shape[1]) // 16,
    "what is written into it": in_place,
}

HIDING_NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "a window of every length": lambda x: distance(x) < LONGEST,
    "all tokens": lambda x: lengths(x, x.shape[1]),
    "ones, as a bias": lambda x: additive(torch.ones(x.shape[:2]))[:, None],
    "like an input": lambda x: torch.ones_like(x[..., 0]).bool()[:, None],
    "chosen": lambda x: torch.where(distance(x) >= 0, 0.0, float("-inf")),
    "filled": lambda x: torch.zeros(x.shape[1], x.shape[1]).masked_fill(distance(x) < 0, -1e9),
}


def captured(mask: Callable[[Tensor], Tensor]) -> Bundle:
    ranges = {"tokens": AxisRange(1, LONGEST)}
    example = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    return tokopt.capture(Attention(mask), (example,), dynamic={"x": ("batch", "tokens")}, ranges=ranges)


@pytest.mark.parametrize("name", [*HIDING, *HIDING_NOTHING])
def test_whatever_a_mask_is_made_of_every_size_is_right(name: str) -> None:
    """And one that is proved to hide nothing is gone."""
    mask = {**HIDING, **HIDING_NOTHING}[name]
    bundle = captured(mask)
    assert bundle.main.ranges["tokens"].max == LONGEST or name == "what is written into it"
    for tokens in (1, 2, 8, 17, 21, 100, LONGEST):
        if tokens <= (bundle.main.ranges["tokens"].max or tokens):
            x = torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(tokens))
            torch.testing.assert_close(bundle(x)[0], Attention(mask)(x), atol=1e-5, rtol=1e-5)
    (site,) = find_sites(bundle.main.module.graph)
    assert (site.mask is None) == (name in HIDING_NOTHING)


class Counting(nn.Module):
    """A model that remembers how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Doubling(nn.Module):
    """A model that changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) + 1


def test_a_model_that_changes_what_outlives_the_call_is_refused() -> None:
    with pytest.raises(CaptureError, match="changes its buffer 'calls' whenever it is called"):
        tokopt.capture(Counting(), (torch.randn(3, 4),))


def test_a_program_leaves_its_input_as_it_is() -> None:
    """Where the model writes into it, the program gives the same and writes nothing."""
    bundle = tokopt.capture(Doubling(), (torch.randn(3, 4),))
    x = torch.randn(3, 4)
    given = x.clone()
    torch.testing.assert_close(bundle(given)[0], 2 * x + 1)
    assert torch.equal(given, x)


class First(nn.Module):
    """The sum of the first eight tokens, which a shorter example makes the sum of all."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :8].sum(1)


def test_a_bundle_refuses_sizes_that_its_graph_was_not_captured_for() -> None:
    """Only up to the length where a branch on sizes was taken as in the example is the graph the model."""
    bundle = tokopt.capture(First(), (torch.randn(3, 6, 4),), dynamic={"x": ("batch", "tokens")})
    for x in (torch.randn(2, 19, 4), torch.randn(2, 5, 3), torch.randn(2, 5)):
        with pytest.raises(InputError, match=r"'x' has .*, (and the program|the model) takes"):
            bundle(x)
    x = torch.randn(2, 7, 4)
    torch.testing.assert_close(bundle(x)[0], First()(x))


class Overwriting(nn.Module):
    """A model that keeps what it computed in a buffer."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.copy_(x.abs().amax())
        return x / self.scale


def test_a_buffer_that_every_call_overwrites_is_refused() -> None:
    with pytest.raises(CaptureError, match="changes its buffer 'scale' whenever it is called"):
        tokopt.capture(Overwriting(), (torch.randn(2, 4),))
