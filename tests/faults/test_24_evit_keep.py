"""EViT's ``keep`` counted the fused token; in the paper it counts the attentive tokens that stay beside it.

The law: a share of the unprotected tokens is as many tokens as the method's publication says.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

import tokopt
from tests.zoo.blocks import FunctionalAttention, PreNormBlock
from tests.zoo.entries import randomize
from tokopt.ir.bundle import Bundle

BLOCKS = 4


@cache
def stream(tokens: int) -> Bundle:
    """Four blocks on a class token and patches."""
    blocks = [PreNormBlock(16, 32, FunctionalAttention(16, 2)) for _ in range(BLOCKS)]
    return tokopt.capture(randomize(torch.nn.Sequential(*blocks)), (torch.ones(2, tokens, 16),))


def lengths(tokens: int, text: str) -> tuple[int, ...]:
    """Tokens that the attentions see, the first of which are all."""
    _, report = tokopt.parse(text).run(stream(tokens))
    return report.records[-1].after.tokens


@pytest.mark.parametrize(
    ("tokens", "text", "wanted"),
    [
        (
            65,
            "evit{keep=0.7 layers=[0,2] prefix=1}",
            (65, 47, 47, 35),
        ),  # 45 + 1, then ceil(0.7 * 46) = 33 + 1
        (197, "evit{keep=0.7 layers=[2] prefix=1}", (197, 197, 197, 140)),  # 138 + 1
        (65, "evit{keep=0.7 layers=[0,2] fuse=false prefix=1}", (65, 46, 46, 33)),
        (65, "evit{r=18 layers=[0] prefix=1}", (65, 47, 47, 47)),  # r counts what the stream loses
        (65, "evit{keep=0.99 layers=[0] prefix=1}", (65, 65, 65, 65)),  # fusing one token saves none
        (66, "evit{keep=0.7 layers=[0] prefix=2}", (66, 48, 48, 48)),
    ],
)
def test_keep_counts_attentive_tokens(tokens: int, text: str, wanted: tuple[int, ...]) -> None:
    assert lengths(tokens, text) == wanted


@pytest.mark.parametrize(
    ("text", "left"),
    [("tome{keep=0.7}", 45), ("kcenter{keep=0.7}", 45), ("random{keep=0.7}", 45), ("divprune{keep=0.7}", 45)],
)
def test_other_methods_keep_the_share(text: str, left: int) -> None:
    """0.7 of 64 is 44.8."""
    assert lengths(65, text.replace("}", " layers=[0] prefix=1}"))[1] == left + 1
