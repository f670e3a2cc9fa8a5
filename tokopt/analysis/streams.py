"""Streams of tokens: blocks of one model may work on different tokens, as the towers of CLIP do.

A token axis is followed within its stream. What cannot be done in one stream says nothing of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokopt.analysis.blocks import Block
from tokopt.analysis.constants import evaluate
from tokopt.analysis.token_axis import Seed, TokenTrace, is_content, trace_tokens
from tokopt.ir.graph import HIDDEN, ancestors

Stream = tuple[Block, ...]
"""Blocks on the same tokens, in execution order."""


@dataclass(frozen=True)
class Streams:
    """The streams of a graph, and the blocks that are in none, each with the reason."""

    streams: tuple[Stream, ...]
    unfit: tuple[tuple[Block, str], ...]

    @property
    def count(self) -> int:
        """How many blocks there are, in a stream or not."""
        return len(self.blocks) + len(self.unfit)

    @property
    def blocks(self) -> list[Block]:
        """The blocks of all streams, in execution order."""
        return sorted((block for stream in self.streams for block in stream), key=lambda block: block.index)


def find_streams(module: GraphModule, blocks: Sequence[Block], example: Sequence[Tensor]) -> Streams:
    """Group blocks by the tokens that they work on.

    A block is in no stream whose keys are in a cache, whose attention is causal, by its mask on the ``example`` inputs
    or by itself, whose tokens are learned queries or along no single axis, or whose attention does not see its stream's
    tokens in their order.
    """
    inputs = (node for node in module.graph.nodes if node.op == "placeholder")
    known = dict(zip(inputs, example, strict=True))
    streams: list[list[Block]] = []
    traces: dict[Block, TokenTrace] = {}
    unfit: list[tuple[Block, str]] = []
    for block in blocks:
        if reason := _unlike(block):
            unfit.append((block, reason))
            continue
        trace = trace_tokens(module.graph, {block.stream: Seed(block.tokens_at)}, reduce=False)
        if reason := _unseen(block, trace) or _causal(module, block, known):
            unfit.append((block, reason))
            continue
        traces[block] = trace
        joined = [s for s in streams if _whole(traces[s[-1]], block.stream, block.tokens_at)]
        if joined:
            joined[-1].append(block)
        else:
            streams.append([block])
    learned = [stream for stream in streams if not _depends_on_input(stream[0])]
    unfit += [(block, _LEARNED) for stream in learned for block in stream]
    return Streams(tuple(tuple(s) for s in streams if s not in learned), tuple(unfit))


_CAUSAL = "causal attention: reducing tokens would let later tokens reach earlier ones"


def _unlike(block: Block) -> str | None:
    """Why a block's tokens are not those of an encoder; None where they may be."""
    if block.site.cached:
        return "its keys and values are in a cache, which the eviction passes bound"
    if block.site.causal:
        return _CAUSAL
    if block.token_axis is None:
        return "the residual stream has no single axis of the attention's token count"
    return None


_LEARNED = "its tokens are learned queries, each of which is read by its place"


def _depends_on_input(block: Block) -> bool:
    return any(node.op == "placeholder" for node in {block.stream, *ancestors(block.stream)})


def _unseen(block: Block, trace: TokenTrace) -> str | None:
    """Why the attention's tokens are not those of the stream; None where they are, in the same order."""
    if all(_whole(trace, node) for node in (block.site.query, block.site.key)):
        return None
    return str(trace.obstacles[0]) if trace.obstacles else "the attention does not see the stream's tokens"


def _whole(trace: TokenTrace, node: Node, dim: int | None = None) -> bool:
    """Whether one axis of a node's value (``dim``, where given) is all tokens of the trace."""
    label = trace.labels.get(node)
    if label is None or len(label.axes) != 1:
        return False
    axis = label.axes[0]
    return axis.plain and (axis.start, axis.stop) == (0, None) and dim in (None, axis.dim)


def _causal(module: GraphModule, block: Block, known: dict[Node, Any]) -> str | None:
    """Why a mask forbids a reduction: it hides all later tokens, or all earlier ones."""
    mask = block.site.mask
    if mask is None or is_content(mask):
        return None
    value = evaluate(module, mask, known)
    shown = value if value.dtype == torch.bool else value > HIDDEN
    tokens = shown.shape[-1]
    if shown.ndim < 2 or shown.shape[-2] != tokens or tokens == 1:
        return None
    if any(not (shown & side).any() for side in _sides(tokens)):
        return _CAUSAL
    return None


def _sides(tokens: int) -> tuple[Tensor, Tensor]:
    """What is above and what is below the diagonal of a mask."""
    every = torch.ones(tokens, tokens, dtype=torch.bool)
    return every.triu(1), every.tril(-1)
