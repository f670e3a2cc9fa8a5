"""What a search tries on a model where nothing is said: kinds of methods, in the order in which a pipeline has them."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from tokopt.analysis.blocks import blocks_of
from tokopt.ir.bundle import Bundle
from tokopt.ir.format import BATCH
from tokopt.ir.graph import aten, is_call, results
from tokopt.ir.program import Program

Space = tuple[tuple[str, ...], ...]
"""Kinds of methods, and the candidates of each; at most one of each kind is in a pipeline."""

FEWEST = 4
"""Blocks that a model has at least of which some are left out."""

_TOKENS = ("tome{target=0.75}", "tome{target=0.5}", "tome{target=0.35}", "tome{target=0.25}")
_PRODUCTS = ("int8", "smoothquant,int8{activations=static}", "rtn{bits=8}")
_EVICTIONS = ("streaming{budget=0.5}", "h2o{budget=0.5}", "expected_attention{budget=0.5}")
_DRAFTERS = (
    *(f"speculate{{drafter={name}}}" for name in ("prompt_lookup", "hybrid", "token_recycling", "logitspec")),
    *(f"verify --drafter {name}" for name in ("suffix", "hybrid")),
)
"""Inside the program, and of the host where it has others."""

_WEIGHTS = ("keep_grid", "rtn{bits=8}", "gptq{group=16 order=true}", "rtn")


def default_space(bundle: Bundle) -> Space:
    """The kinds for a model, those without a candidate left out.

    Blocks leave a model of one program that has :data:`FEWEST` or more, a twelfth and a sixth of them. Rows leave an
    encoder early after half and three quarters of its blocks, where it has an output [batch, n]: by the margin of two
    classes where that is the product of a linear layer, and else by convergence. Thresholds are given, since a promise
    takes more inputs than a search mostly has; what they cost is judged on inputs of its own.
    """
    blocks = len(blocks_of(bundle.main.module.graph)) if len(bundle.entries) == 1 else 0
    fewer = _fewer(blocks)
    if bundle.schedule.generates:
        kinds = (fewer, _EVICTIONS, _WEIGHTS, ("int8_kv",), _DRAFTERS)
    else:
        kinds = (fewer, _TOKENS, _exits(bundle.main, blocks), _PRODUCTS)
    return tuple(kind for kind in kinds if kind)


def _fewer(blocks: int) -> tuple[str, ...]:
    if blocks < FEWEST:
        return ()
    counts = dict.fromkeys(max(round(blocks / part), 1) for part in (12, 6))
    return tuple(f"drop_blocks{{count={count} heal=true}}" for count in counts)


def _exits(program: Program, blocks: int) -> tuple[str, ...]:
    outputs = zip(program.outputs, results(program.module.graph), strict=True)
    found = next((node for spec, node in outputs if _is_row(spec.axes)), None)
    if found is None or blocks < FEWEST:
        return ()
    after = f"{blocks // 2},{3 * blocks // 4}"
    rule, thresholds = ("margin", (0.9, 0.6)) if _is_product(found) else ("convergence", (0.98, 0.95))
    return tuple(f"exit{{after=[{after}] rule={rule} threshold={threshold}}}" for threshold in thresholds)


def _is_row(axes: Sequence[int | str]) -> bool:
    """Whether an output has several numbers for every row."""
    return len(axes) == 2 and axes[0] == BATCH and isinstance(axes[1], int) and axes[1] > 1


def _is_product(node: Node) -> bool:
    return is_call(node, aten.linear, aten.addmm)
