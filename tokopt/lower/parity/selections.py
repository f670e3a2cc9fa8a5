"""Compare two forms of a program that chooses tokens or rounds activations, when they chose differently.

Among many tokens some are nearly equally good, and two engines that round differently take different ones;
everything after the choice then differs, although both are right. So the ONNX form runs with its selections as
further outputs, and the exported program runs again with each of its selections replaced by the ONNX one:
all arithmetic must agree as closely as ever, and the selections themselves on nearly all tokens. So it is with
activations that are rounded to 8 bits: what lies near the middle of two steps falls either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map

from tokopt.ir.graph import is_call
from tokopt.ir.program import Program
from tokopt.kernels import OPS, declared, ops
from tokopt.kernels.cpu import DOMAIN
from tokopt.lower.cpu.int8_body import NAME, rounding
from tokopt.lower.onnx.real_tokens import plain_name
from tokopt.lower.parity.precision import InFloat64, widened

DIFFERENT = 0.02
"""The largest share of tokens on which two forms of one selection may differ, beside :data:`SLACK`."""

DIFFERENT_BY_RANK = 0.1
"""The same where ranks alternate between merging and being merged into: a near tie then exchanges the roles of
two tokens and redirects all that merge into them. A wrong form differs on half of the tokens."""

SCALED = {"GroupQueryAttention": 14, "CachedAttention": 11}
"""Inputs of an attention over a cache in 8 bits: its scales are the last two."""

SLACK = 2
"""Tokens on which a selection may differ in any case: one pair that changed places."""


@dataclass(frozen=True)
class Selection:
    """One selection in both forms: the tokens (numbers, where it rounds) that fared differently, out of ``tokens``."""

    name: str
    different: int
    tokens: int
    share: float = DIFFERENT

    @property
    def ok(self) -> bool:
        """Whether near ties explain the difference."""
        return self.different <= SLACK + self.share * self.tokens


def selects(program: Program) -> bool:
    """Whether the program chooses tokens, or rounds activations."""
    return bool(_selections(program))


def selection_shapes(program: Program) -> list[str]:
    """The sizes of everything that the program's selections give, in order."""
    return [
        str([tuple(value.shape) for value in tree_leaves(node.meta["val"])]) for node in _selections(program)
    ]


def _selections(program: Program) -> list[Node]:
    ops = ((node, declared(node.target)) for node in program.module.graph.nodes)
    return [node for node, op in ops if op is not None and op.unstable]


def expose_selections(path: Path) -> tuple[Path, list[list[str]]]:
    """A copy of the ONNX file beside it whose selections are outputs; returns it and their names, in order."""
    model = ir.load(path)
    names = []
    rounded: set[object] = set()
    for node in list(model.graph):
        op = OPS.get(plain_name(node)) if node.domain == "tokopt" else None
        chosen = [list(node.outputs)] if op is not None and op.unstable else []
        own = [*_new_codes(model.graph, node), *_rounded(model.graph, node, rounded)]
        for values in chosen or [[value] for value in own]:
            names.append([str(value.name) for value in values])
            known = {value.name for value in model.graph.outputs}
            model.graph.outputs.extend(value for value in values if value.name not in known)
    copy = path.with_name(f"{path.stem}-selections.onnx")
    ir.save(model, copy)
    return copy, names


def _new_codes(graph: ir.Graph, node: ir.Node) -> list[ir.Value]:
    """What an attention that rounds keys and values itself wrote to its cache: their new tokens, as the op rounds them.

    See :mod:`tokopt.lower.onnxruntime.attention` and :mod:`tokopt.lower.cpu.cached_attention`.
    """
    ones = node.op_type == "GroupQueryAttention"
    if not (ones or node.op_type == "CachedAttention") or len(node.inputs) < SCALED[node.op_type]:
        return []
    made: list[ir.Node] = []

    def op(operation: str, *given: ir.Value | None, **attributes: int | list[int]) -> ir.Value:
        made.append(ir.node(operation, given, attributes=attributes))
        return made[-1].outputs[0]

    count = op("Squeeze", op("Shape", node.inputs[0], start=1, end=2))
    length = node.inputs[5]
    zero, one = (op("Constant", value_int=value) for value in (0, 1))
    if ones:  # which is told the last slot that it writes
        length = op("Sub", op("Add", op("Cast", length, to=ir.DataType.INT64), one), count)
    new = op("Add", op("Unsqueeze", length, op("Constant", value_ints=[1])), op("Range", zero, count, one))
    slots = op("Unsqueeze", new, op("Constant", value_ints=[1, 3]))
    found = []
    for cache in node.outputs[1:]:
        size = op("Shape", cache)
        ends = [op("Gather", size, op("Constant", value_ints=[axis])) for axis in (0, 1, 3)]
        shape = op(
            "Concat",
            ends[0],
            ends[1],
            op("Unsqueeze", count, op("Constant", value_ints=[0])),
            ends[2],
            axis=0,
        )
        codes = op("GatherElements", cache, op("Expand", slots, shape), axis=2)
        codes.type, codes.name, codes.shape = cache.type, f"{cache.name}_new", ir.Shape([None] * 4)
        found.append(codes)
    graph.insert_after(node, made)
    return found


def _rounded(graph: ir.Graph, node: ir.Node, known: set[object]) -> list[ir.Value]:
    """What a product that rounds its activations itself makes of them; those of one tensor and grid once.

    See :mod:`tokopt.lower.cpu.int8_linear`.
    """
    if (node.domain, node.op_type) != (DOMAIN, NAME):
        return []
    x, given = node.inputs[0], node.attributes
    assert x is not None
    key = (x, *(given[name].value for name in ("step", "zero") if name in given))
    if key in known:
        return []
    known.add(key)
    nodes = rounding(x, given)
    for place, made in enumerate(nodes):
        made.outputs[0].name = f"{node.outputs[0].name}_rounding_{place}"
    last = nodes[-1].outputs[0]
    last.type, last.shape = ir.TensorType(ir.DataType.FLOAT), x.shape
    graph.insert_before(node, nodes)
    return [last]


@dataclass
class _Forced(Interpreter):
    """Runs a graph with its selections replaced by ``given``, and compares each with its own."""

    module: torch.fx.GraphModule
    given: Iterator[list[Tensor]]
    compared: list[Selection] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.module)

    def run_node(self, n: Node) -> Any:
        own = super().run_node(n)
        op = declared(n.target)
        if op is None or not op.unstable:
            return own
        outputs = list(own) if isinstance(own, (tuple, list)) else [own]
        forced = self.selected(n, outputs)
        share = DIFFERENT_BY_RANK if op.choice is not None and op.choice.by_rank else DIFFERENT
        found = _compare_steps(outputs[0], forced[0], n) if op.rounds else _compare(outputs, forced)
        self.compared.append(Selection(n.name, *found, share))
        return tuple(forced) if isinstance(own, (tuple, list)) else forced[0]

    def selected(self, n: Node, own: list[Tensor]) -> list[Tensor]:
        """What stands for the outputs of a selection."""
        return next(self.given)


class _Alike(_Forced):
    """Runs a graph with the selections of another one, by name, as far as both have one of the same sizes."""

    def __init__(self, module: torch.fx.GraphModule, found: Mapping[str, list[Tensor]]) -> None:
        super().__init__(module, iter(()))
        self.found = found

    def selected(self, n: Node, own: list[Tensor]) -> list[Tensor]:
        """That of the other graph, or its own."""
        other = self.found.get(n.name, own)
        return other if [x.shape for x in other] == [x.shape for x in own] else own


class _Recorded(Interpreter):
    """Runs a graph and keeps what its selections give, by name."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, list[Tensor]] = {}

    def run_node(self, n: Node) -> Any:
        made = super().run_node(n)
        op = declared(n.target)
        if op is not None and op.unstable:
            self.found[n.name] = list(made) if isinstance(made, (tuple, list)) else [made]
        return made


def run_alike(
    program: Program, other: Program, inputs: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[Tensor], list[Selection]]:
    """The outputs of two programs of which one was made of the other, under the selections of ``other``.

    A selection that the change dropped, or narrowed to fewer tokens, stays what ``program`` makes it. The third are the
    selections of ``program``, and how its own ones differ.
    """
    recorded = _Recorded(other.module)
    with torch.no_grad():
        made = list(recorded.run(*inputs))
        alike = _Alike(program.module, recorded.found)
        return list(alike.run(*inputs)), made, alike.compared


class _ForcedInFloat64(_Forced, InFloat64):
    """The same in float64."""

    def run_node(self, n: Node) -> Any:
        return tree_map(widened, super().run_node(n))


def run_with_selections(
    program: Program, inputs: tuple[Tensor, ...], selections: list[list[np.ndarray]]
) -> tuple[list[Tensor], list[Selection]]:
    """The exported program's outputs under the given selections, and how its own ones differ."""
    forced = _Forced(program.module, _as_tensors(selections))
    with torch.no_grad():
        outputs = forced.run(*inputs)
    return list(outputs), forced.compared


def run_in_float64_with_selections(
    program: Program, inputs: tuple[Tensor, ...], selections: list[list[np.ndarray]]
) -> list[Tensor]:
    """The outputs under the given selections with float64 in the place of float32."""
    with torch.no_grad():
        return list(_ForcedInFloat64(program.module, _as_tensors(selections)).run(*inputs))


def _as_tensors(selections: list[list[np.ndarray]]) -> Iterator[list[Tensor]]:
    return iter([[torch.from_numpy(array) for array in arrays] for arrays in selections])


def _compare_steps(own: Tensor, given: Tensor, node: Node) -> tuple[int, int]:
    """How many numbers fell on another step, and how many there are; all of them if one fell further than the next."""
    step: Tensor | float = node.args[1] if isinstance(node.args[1], float) else 1  # codes
    if is_call(node, ops.fake_float8):
        step = _float8_step(torch.minimum(own.abs(), given.abs()).float() / step) * step
    apart = (own.float() - given.float()).abs() / step
    return (own.numel() if bool((apart > 1.5).any()) else int((apart > 0.5).sum())), own.numel()


def _float8_step(size: Tensor) -> Tensor:
    """From a number of E4M3 of this magnitude to the next larger one: 3 bits of mantissa, the least exponent -6."""
    _, exponent = torch.frexp(size)
    return torch.ldexp(torch.ones_like(size), (exponent - 1).clamp(min=-6) - 3)


def _compare(own: list[Tensor], given: list[Tensor]) -> tuple[int, int]:
    """How many tokens fare differently, and how many there are."""
    a, b = _fate(own), _fate(given)
    return (a.numel() if a.shape != b.shape else int((a != b).sum())), a.numel()


def _fate(outputs: list[Tensor]) -> Tensor:
    """What becomes of every token [batch, tokens]: itself if kept, -1 if dropped, else what it merges into.

    Independent of the order in which a selection lists its tokens. A selection of destinations alone is its
    own fate.
    """
    if len(outputs) == 1:
        return outputs[0]
    keep, drop = outputs[:2]
    target = keep.gather(1, outputs[2]) if len(outputs) > 2 else torch.full_like(drop, -1)
    fate = torch.full((keep.shape[0], keep.shape[1] + drop.shape[1]), -1)
    return fate.scatter(1, keep, keep).scatter(1, drop, target)
