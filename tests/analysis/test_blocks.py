"""Blocks: of encoders and decoders alike, where each begins and ends."""

from __future__ import annotations

from itertools import pairwise

import pytest
from torch.fx import Node

import tokopt
from tests.matrix import language
from tests.matrix.test_matrix import captured
from tests.zoo import ZOO
from tests.zoo.decoders import DECODERS
from tokopt.analysis.blocks import blocks_of
from tokopt.analysis.outline import outline
from tokopt.ir.graph import aten, attention_nodes, is_call, reaches


def as_it_is(node: Node) -> Node:
    """Past casts that change nothing."""
    while is_call(node, aten.to):
        node = node.all_input_nodes[0]
    return node


@pytest.mark.parametrize("name", [*ZOO, *DECODERS])
def test_a_block_ends_where_the_next_one_begins(name: str) -> None:
    """Between two blocks stands the residual stream alone; a hierarchical model reduces its tokens there."""
    bundle = captured(name) if name in ZOO else language.bundle(name)
    graph = bundle.main.module.graph
    blocks = blocks_of(graph)
    attentions = attention_nodes(graph)
    pooling = sum(entry.pooling for entry in ZOO.values() if entry.name == name)
    assert len(blocks) == len(attentions) - pooling
    assert all(block.site.cached == (name in DECODERS) for block in blocks)
    for block in blocks:
        assert str(block.end.meta["val"].shape) == str(block.stream.meta["val"].shape)
    for block, following in pairwise(blocks):
        if name != "swin":
            assert as_it_is(following.stream) is block.end
        assert following.stream is block.end or following.stream in reaches(block.end)
    assert not reaches(blocks[-1].end).intersection(block.site.node for block in blocks)


def test_a_cache_of_integers_makes_no_other_block() -> None:
    made = tokopt.optimize(
        language.bundle("llama"), "int8_kv", strict=True, calibration=[language.prompt(24)]
    )
    assert len(blocks_of(made.main.module.graph)) == 2
    assert [(row.index, row.note) for row in outline(made).blocks] == [
        (0, "pre-norm, cached"),
        (1, "pre-norm, cached"),
    ]
