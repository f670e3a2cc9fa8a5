"""``torch.export`` in tokopt's flat calling convention, and the way back to a graph that can be edited."""

# sympy, of which torch makes its symbols, is untyped.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportPrivateUsage=false

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo.config
from torch.export import _trace
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, free_unbacked_symbols

from tokopt.errors import CaptureError
from tokopt.ir.graph import describe, drop_asserts, results
from tokopt.ir.mutation import drop_write_backs, without_mutation
from tokopt.ir.program import AxisRange, Program, TensorSpec

Ranges = Mapping[str, AxisRange]


def unlifted(exported: torch.export.ExportedProgram) -> GraphModule:
    """The graph with its parameters as attributes, flat in and flat out, without dead code."""
    module = exported.module(check_guards=False)
    assert isinstance(module, GraphModule)
    return copied(module)


def copied(module: GraphModule) -> GraphModule:
    """A copy of the graph, without dead code and asserts, that shares parameters and buffers with ``module``.

    Its Python is only written when it is called.
    """
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    drop_asserts(graph)
    graph.eliminate_dead_code()
    return LazyGraphModule(module, graph)


def export_flat(
    model: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: tuple[TensorSpec, ...],
    ranges: Ranges,
) -> tuple[GraphModule, Ranges]:
    """The graph of a module that takes positional tensors and returns a tuple of tensors, its parameters as attributes.

    Returns the ranges too, narrowed by the bounds that the model itself sets (a table of 512 positions, say).
    """
    solved = _Bounds(ranges)
    try:
        quick = _use_lazy_graph_module(True)
        with warnings.catch_warnings(), torch.no_grad(), _caching(ranges), quick, solved:
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                model,
                example,
                dynamic_shapes=_dynamic_shapes(inputs, ranges),
                strict=False,
            )
            _refuse_sizes_from_values(exported)
            exported = without_mutation(exported, inputs)
        module = unlifted(exported)
        drop_write_backs(module)
        return copied(module), solved.ranges
    except Exception as error:
        narrowed = _suggested_ranges(str(error), ranges)
        if narrowed == ranges:
            raise
    return export_flat(model, example, inputs, narrowed)


class _Bounds:
    """While it is entered, bounds that a model sets are noted in ``ranges``, and its graph is kept.

    ``torch.export`` refuses such a model when all is traced, and suggests bounds; exported again within them it would
    be the same. Where more is suggested than bounds, it refuses still.
    """

    def __init__(self, ranges: Ranges) -> None:
        self.ranges = ranges
        self._solve = getattr(_trace, _SOLVE)
        self._patch = patch.object(_trace, _SOLVE, self._solved)

    def __enter__(self) -> None:
        self._patch.start()

    def __exit__(self, *_: object) -> None:
        self._patch.stop()

    def _solved(self, **given: Any) -> None:
        try:
            self._solve(**given)
        except ConstraintViolationError as error:
            narrowed = _suggested_ranges(str(error), self.ranges)
            if narrowed == self.ranges or not _suggests_bounds_alone(str(error)):
                raise
            self.ranges = narrowed


_SOLVE = "produce_guards_and_solve_constraints"
"""The function of torch that is called when a model is traced, and raises where it sets bounds."""


def _suggests_bounds_alone(text: str) -> bool:
    """Whether the "Suggested fixes" of ``torch.export`` give axes bounds, and nothing else."""
    _, _, suggested = text.partition("Suggested fixes:\n")
    fixes = [line.strip() for line in suggested.splitlines() if line.strip()]
    bounds = r"(\w+) = Dim\('\1'(?:, (?:min|max)=\d+)+\)"
    return bool(fixes) and all(re.fullmatch(bounds, fix) for fix in fixes)


def _caching(ranges: Ranges) -> AbstractContextManager[None]:
    """Let torch run an operator anew on values without data where an entry of its cache, which grows with the symbols
    in it, costs more than that.
    """
    config: Any = torch._dynamo.config
    return config.patch(fake_tensor_cache_enabled=len(ranges) < 2)


def _refuse_sizes_from_values(exported: torch.export.ExportedProgram) -> None:
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and any(map(free_unbacked_symbols, value.shape)):
            raise CaptureError(
                f"the model makes a size of the values of its inputs ({describe(node)}), and sizes have to follow from "
                "sizes; give the values to the model itself, as numbers"
            )


def _dynamic_shapes(
    inputs: tuple[TensorSpec, ...], ranges: Ranges
) -> tuple[tuple[dict[int, object] | None, ...]]:
    dims = {name: torch.export.Dim(name, min=r.min, max=r.max) for name, r in ranges.items()}
    return (
        tuple(
            {i: dims[axis] for i, axis in enumerate(spec.axes) if isinstance(axis, str)} or None
            for spec in inputs
        ),
    )


def _suggested_ranges(text: str, ranges: Ranges) -> Ranges:
    """The bounds in the "Suggested fixes" of ``torch.export``, within those already known."""
    narrowed = dict(ranges)
    for axis, known in ranges.items():
        found = re.search(rf"\b{axis}\s*=\s*Dim\('{axis}'((?:, (?:min|max)=\d+)+)\)", text)
        bounds = dict(re.findall(r"(min|max)=(\d+)", found[1])) if found else {}
        low, high = max(int(bounds.get("min", 1)), known.min), int(bounds.get("max", known.max or 0)) or None
        narrowed[axis] = AxisRange(low, min(high, known.max) if high and known.max else high)
    return narrowed


def output_specs(program: Program) -> tuple[TensorSpec, ...]:
    """Output specs with axes read off the graph; a symbol is spelled by the input axis it came from."""
    names = axis_names(placeholders(program.module), program.inputs)
    specs: list[TensorSpec] = []
    for spec, node in zip(program.outputs, results(program.module.graph), strict=True):
        value = node.meta["val"]
        axes = tuple(size if isinstance(size, int) else spell(size, names) for size in value.shape)
        specs.append(replace(spec, axes=axes, dtype=str(value.dtype).removeprefix("torch.")))
    return tuple(specs)


def axis_names(placeholders: Sequence[Node], inputs: tuple[TensorSpec, ...]) -> dict[str, str]:
    """Symbol (``"s77"``) -> the named axis of an input that it stands for."""
    names: dict[str, str] = {}
    for node, spec in zip(placeholders, inputs, strict=True):
        for size, axis in zip(node.meta["val"].shape, spec.axes, strict=True):
            if isinstance(axis, str) and not isinstance(size, int):
                names[str(size)] = axis
    return names


def placeholders(module: GraphModule) -> list[Node]:
    """The node of every input, in order."""
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def user_inputs(exported: torch.export.ExportedProgram) -> list[Node]:
    """The node of every input of an exported program, in order; parameters are none."""
    names = set(exported.graph_signature.user_inputs)
    return [node for node in exported.graph.nodes if node.op == "placeholder" and node.name in names]


def spell(size: object, names: Mapping[str, str]) -> str:
    """A size as an expression of named axes (``"tokens - 4"``), which ``names`` gives by symbol."""
    # A symbol may begin with another's name: s7 and s73.
    return re.sub(r"\bs\d+\b", lambda symbol: names.get(symbol[0], symbol[0]), str(size))
