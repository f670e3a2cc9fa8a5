"""Which tokens are near each other: by the distance of their embeddings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokopt.analysis.constants import constants, evaluate
from tokopt.errors import PassRefused
from tokopt.ir.graph import aten, is_call, operand_at, tensor_inputs
from tokopt.ir.program import TensorSpec
from tokopt.rewrite.cache import ProgramEdit
from tokopt.rewrite.edit import call, put_parameter

CHUNK = 1024
"""Tokens whose distances to all others are computed at once."""


def give_neighbours(edit: ProgramEdit, count: int, name: str) -> None:
    """Add the output of role ``neighbours``: the ``count`` tokens nearest to each that is read.

    Raises PassRefused where the tokens are looked up in no table.
    """
    tokens, graph = edit.of_role("tokens"), edit.module.graph
    near = nearest_to(edit.module, graph.output_node(), embeddings(edit.module, tokens), count)
    with graph.inserting_before(graph.output_node()):
        found = call(graph, looked_up, near, tokens, like=tokens)
    edit.outputs.append(TensorSpec(name, "int64", (), "neighbours"))
    edit.results.append(found)


def nearest_to(module: GraphModule, reader: Node, table: Tensor, count: int) -> Node:
    """A parameter in front of ``reader``: the ``count`` tokens nearest to each by their embeddings in a ``table``.

    Raises PassRefused where there are not so many.
    """
    if count >= len(table):
        raise PassRefused(f"each of its {len(table)} tokens has fewer than {count} neighbours")
    return put_parameter(module, reader, None, nearest(table, count))


def embeddings(module: GraphModule, tokens: Node) -> Tensor:
    """The embeddings [vocabulary, channels] of the tokens; raises PassRefused where they are looked up in no table."""
    known = constants(module.graph)
    for node in module.graph.nodes:
        if not is_call(node, aten.embedding) or operand_at(node, 0) not in known:
            continue
        index = operand_at(node, 1)
        while index is not tokens and len(above := tensor_inputs(index)) == 1:
            index = above[0]  # a view of them
        table = evaluate(module, operand_at(node, 0), {}) if index is tokens else None
        if table is not None and table.is_floating_point():  # codes alone say no distance
            return table.float()
    raise PassRefused("its tokens are looked up in no table, by which some would be near others")


def nearest(table: Tensor, count: int) -> Tensor:
    """The ``count`` nearest other rows [rows, count] int32 of each row of a ``table``, the nearest first."""
    found: list[Tensor] = []
    for start in range(0, len(table), CHUNK):
        apart = torch.cdist(table[start : start + CHUNK], table)
        apart[torch.arange(len(apart)), start + torch.arange(len(apart))] = torch.inf
        found.append(apart.topk(count, largest=False).indices)
    return torch.cat(found).int()


def looked_up(near: Tensor, tokens: Tensor) -> Tensor:
    """The neighbours of tokens [batch, tokens] in a table of them."""
    return near[tokens].long()
