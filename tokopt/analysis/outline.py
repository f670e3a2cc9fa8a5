"""What is worth knowing of a bundle at a glance: the attentions of its programs, and what a call of each costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
class ProgramOutline:
    """The attentions of a program in execution order, the cost of one call, and the example's batch."""

    blocks: tuple[BlockRow, ...]
    cost: Cost
    batch: int

    @classmethod
    def of(cls, program: Program) -> ProgramOutline:
        shape = program.example[0].shape
        return cls(tuple(describe_blocks(program)), program_cost(program), shape[0] if len(shape) else 1)


@dataclass(frozen=True)
class Outline(ProgramOutline):
    """The outline of a main program, and those of all ``programs`` by name where there are several."""

    programs: Mapping[str, ProgramOutline]

    def to_json(self) -> str:
        """The text that ``tokopt inspect`` reads."""
        return json.dumps(asdict(self), indent=1)


def outline(bundle: Bundle) -> Outline:
    """The outline of a bundle."""
    programs = {name: ProgramOutline.of(program) for name, program in bundle.programs.items()}
    main = programs[bundle.main_name]
    return Outline(main.blocks, main.cost, main.batch, programs if len(programs) > 1 else {})


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
