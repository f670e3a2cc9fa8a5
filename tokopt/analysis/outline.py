"""What is worth knowing of a bundle at a glance: its attentions, and what a call of its main program costs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from tokopt.analysis.blocks import Block, find_blocks
from tokopt.analysis.cost import Cost, node_flops, program_cost
from tokopt.ir.bundle import Bundle
from tokopt.ir.graph import is_tensor, module_path
from tokopt.ir.program import Program


@dataclass(frozen=True)
class BlockRow:
    """One attention: ``index`` counts the blocks, None for what is none.

    ``flops`` is the cost of the layer that holds the attention (the module path up to its last number), under
    the example inputs. ``note`` is the norm style and whether keys are cached, or the reason why the site is no block.
    """

    index: int | None
    path: str
    kind: str
    tokens: int
    heads: int
    flops: int
    note: str


@dataclass(frozen=True)
class Outline:
    """The attentions of a main program in execution order, the cost of one call, and the example's batch."""

    blocks: tuple[BlockRow, ...]
    cost: Cost
    batch: int

    def to_json(self) -> str:
        """The text that ``tokopt inspect`` reads."""
        return json.dumps(asdict(self), indent=1)


def outline(bundle: Bundle) -> Outline:
    """The outline of a bundle."""
    program = bundle.main
    shape = program.example[0].shape
    return Outline(tuple(describe_blocks(program)), program_cost(program), shape[0] if len(shape) else 1)


def describe_blocks(program: Program) -> list[BlockRow]:
    """A row per attention of ``program``, in execution order."""
    graph = program.module.graph
    costs = [(module_path(n), node_flops(n)) for n in graph.nodes if n.op == "call_function" and is_tensor(n)]
    rows: list[BlockRow] = []
    for found in find_blocks(graph):
        site = found.site
        layer = _layer(site.path)
        flops = sum(flops for path, flops in costs if path == layer or path.startswith(layer + "."))
        note = _note(found) if isinstance(found, Block) else found.reason
        index = found.index if isinstance(found, Block) else None
        rows.append(BlockRow(index, site.path, site.kind, site.tokens, site.heads, flops, note))
    return rows


def _note(block: Block) -> str:
    return f"{block.style}, cached" if block.site.cached else block.style


def _layer(path: str) -> str:
    """The path of the layer: up to and with the last number.

    >>> _layer("encoder.layer.3.attention.attention")
    'encoder.layer.3'
    """
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1] if numbers else parts)
