"""The token axis is followed exactly: reshapes against brute force, obstacles where tokens are mixed or split."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tokopt
import tokopt.errors
from tests.matrix import test_matrix
from tests.zoo import ZOO
from tokopt.analysis.blocks import Block, find_blocks
from tokopt.analysis.token_axis import Seed, TokenAxis, _Cannot, _reshaped, prefix_tokens, trace_tokens


def tokens_along(shape: tuple[int, ...], axis: TokenAxis, tokens: int) -> Tensor:
    """The token number of every element, as an axis ``outer * tokens * inner`` says it."""
    number = torch.arange(shape[axis.dim]) // axis.inner % tokens
    view = [1] * len(shape)
    view[axis.dim] = -1
    return number.view(view).expand(shape)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """A shape, its token axis, and another shape of the same number of elements."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    dim = draw(st.integers(0, len(shape) - 1))
    rest, new = math.prod(shape), []
    while rest > 1 and len(new) < 4:
        divisors = [d for d in range(1, rest + 1) if rest % d == 0]
        new.append(draw(st.sampled_from(divisors)))
        rest //= new[-1]
    return shape, dim, (*new, rest)


@given(reshapes())
def test_a_reshaped_token_axis_is_where_brute_force_finds_it(case: tuple) -> None:
    shape, dim, new = case
    tokens = shape[dim]
    labels = tokens_along(shape, TokenAxis(dim), tokens).reshape(new)
    try:
        axis = _reshaped(TokenAxis(dim), shape, new)
    except _Cannot:
        return
    assert torch.equal(tokens_along(new, axis, tokens), labels)


@pytest.mark.parametrize(
    ("new", "axis"),
    [
        ((5, 37, 4, 12), TokenAxis(1)),
        ((185, 48), TokenAxis(0, outer=5)),
        ((5, 1776), TokenAxis(1, inner=48)),
    ],
)
def test_usual_reshapes_are_followed(new: tuple[int, ...], axis: TokenAxis) -> None:
    assert _reshaped(TokenAxis(1), (5, 37, 48), new) == axis


@pytest.mark.parametrize("name", [n for n, e in ZOO.items() if e.available and e.style != "windows"])
def test_prefix_tokens_are_found_in_the_graph(name: str) -> None:
    """Class and register tokens are parameters that lead the stream; text models have none."""
    entry = ZOO[name]
    graph = test_matrix.captured(name).main.module.graph
    blocks = [b for b in find_blocks(graph) if isinstance(b, Block)]
    assert len(blocks) == entry.layers
    trace = trace_tokens(graph, {blocks[0].residual: Seed(blocks[0].tokens_at)})
    assert max(prefix_tokens(blocks[0].stream), trace.fixed) == entry.prefix


class Encoder(nn.Module):
    """One attention block, then whatever ``head`` does to its tokens [batch, tokens, channels]."""

    def __init__(self, head) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mix = nn.Linear(10, 10)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(self, x + self.out(attended.transpose(1, 2).reshape(x.shape)))


def captured(head) -> tokopt.Bundle:
    torch.manual_seed(0)
    return tokopt.capture(Encoder(head), (torch.randn(3, 10, 16),))


SECOND = {
    "token mixing": (lambda m, x: m.mix(x.transpose(1, 2)).transpose(1, 2), "works across tokens"),
    "windows": (lambda m, x: x.view(-1, 2, 5, 16).flip(2).reshape(-1, 10, 16), "split into groups"),
    "cumulative sum": (lambda m, x: x.cumsum(1), "no rule"),
    "flipped": (lambda m, x: x.flip(1), "no rule"),
    "last token": (lambda m, x: x + x[:, -1:], "from the end|moving start"),
    "softmax over tokens": (lambda m, x: x.softmax(1), "softmax over tokens"),
}


@pytest.mark.parametrize("name", list(SECOND))
def test_what_mixes_tokens_before_an_attention_is_refused(name: str) -> None:
    """An op that works across tokens between two attentions ends the proof, naming the op."""
    mix, reason = SECOND[name]

    def head(model: Encoder, x: Tensor) -> Tensor:
        y = mix(model, x)
        q = y.view(*y.shape[:2], 4, 4).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q).mean((1, 2))

    with pytest.raises(tokopt.errors.PassRefused, match=reason):
        tokopt.optimize(captured(head), "tome{r=2}", strict=True)


@pytest.mark.parametrize("name", [n for n in SECOND if n != "last token"])
def test_what_mixes_tokens_after_the_last_attention_gets_them_all_back(name: str) -> None:
    """Past the last attention nothing is saved by fewer tokens, so they are restored instead of refused."""
    mix, _ = SECOND[name]
    bundle = captured(lambda model, x: mix(model, x))
    reduced = tokopt.optimize(bundle, "tome{r=2}", strict=True)
    assert reduced.main.outputs[0].axes == ("batch", 10, 16)


def test_a_skip_connection_across_a_reduction_is_refused() -> None:
    """Features from before the reduction have tokens that the stream no longer has."""

    class Skip(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            early = self.out(x)
            y = super().forward(x) + early
            q = y.view(*y.shape[:2], 4, 4).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(q, q, q).mean((1, 2))

    torch.manual_seed(0)
    bundle = tokopt.capture(Skip(lambda _, x: x * 2), (torch.randn(3, 10, 16),))
    with pytest.raises(tokopt.errors.PassRefused, match="skip connection"):
        tokopt.optimize(bundle, "tome{r=2}", strict=True)


def test_mean_and_sum_over_tokens_count_originals() -> None:
    """Identical tokens: every mean and sum is what it was, however many are merged or pruned."""
    for head in (lambda m, x: x.mean(1), lambda m, x: x.sum(1), lambda m, x: x[:, 1:].mean(1, keepdim=True)):
        bundle = captured(lambda model, x, head=head: head(model, x))
        same = torch.randn(3, 1, 16).expand(3, 10, 16).contiguous()
        (wanted,) = bundle(same)
        for text in ("tome{r=3}", "random{r=3}", "pitome{r=2}"):
            (got,) = tokopt.optimize(bundle, text, strict=True)(same)
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


class Pooled(nn.Module):
    """A padded encoder whose tokens are pooled with or without the mask."""

    def __init__(self, pool) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.pool = pool

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        q = x.view(*x.shape[:2], 4, 4).transpose(1, 2)
        seen = mask.bool()[:, None, None]
        attended = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=seen)
        return self.pool(x + self.out(attended.transpose(1, 2).reshape(x.shape)), mask[..., None].float())


@pytest.mark.parametrize("pool", [lambda x, mask: x.mean(1), lambda x, mask: x.sum(1)])
def test_pooling_that_counts_padding_is_refused(pool) -> None:
    """Padding loses its weight in a reduction, so only a pooling that ignores it keeps its meaning."""
    torch.manual_seed(0)
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[1, 6:] = 0
    inputs = (torch.randint(0, 50, (3, 10)), mask)
    with pytest.raises(tokopt.errors.PassRefused, match="pools padding together with tokens"):
        tokopt.optimize(tokopt.capture(Pooled(pool), inputs), "tome{r=2}", strict=True)
    masked = Pooled(lambda x, mask: (x * mask).sum(1) / mask.sum(1))
    assert tokopt.optimize(tokopt.capture(masked, inputs), "tome{r=2}", strict=True).history[-1].matches == 1
