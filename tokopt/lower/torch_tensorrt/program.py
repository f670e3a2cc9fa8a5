"""The program that Torch-TensorRT is given: one of tokopt's, in aten operators of the sizes that an engine takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any, cast

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from tokopt.errors import LoweringError
from tokopt.ir.assemble import assemble
from tokopt.ir.export import copied, user_inputs
from tokopt.ir.graph import aten, describe, is_call, is_tensor
from tokopt.ir.program import AxisRange, Program, TensorSpec
from tokopt.kernels import OPS, ops
from tokopt.lower.parity.check import resized
from tokopt.lower.torch_tensorrt.products import symmetric_products
from tokopt.runtime.format.manifest import Profile

CONVERTED = ("fake_quantize", "fake_float8", "quantize_int8", "dequantize_int8")
"""The token ops that stay one node: :mod:`.converters` makes them layers that quantize."""

UNSIGNED = (ops.quantize_keys, ops.dequantize_keys)
"""The token ops of a cache of unsigned bytes."""

PROMOTING = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
"""Operators of which TensorRT wants both operands in the dtype of the result."""


ALL = 2**63 - 1
"""The end of a slice that runs to the end of its axis."""


def sized(program: Program, profiles: Mapping[str, Profile]) -> Program:
    """``program`` with its named axes within ``profiles``; an axis of one size has no name any more.

    An example has the most frequent size of an axis, or its own where that is 1: of a size 1, a trace takes for granted
    that it is one.
    """
    fixed = {axis: profile.opt for axis, profile in profiles.items() if profile.min == profile.max}
    for axis, profile in profiles.items():
        size = (
            profile.opt
            if axis in fixed or profile.opt > 1
            else min(max(2, _size(program, axis)), profile.max)
        )
        program = replace(program, example=resized(program, axis, size))
    ranges = {axis: AxisRange(p.min, p.max) for axis, p in profiles.items() if axis not in fixed}
    inputs = tuple(_without(spec, fixed) for spec in program.inputs)
    # A copy: what is derived of a graph's shapes is kept with it, and these are others.
    module = copied(program.module)
    for node in module.graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = stack.copy()  # torch's export of what it decomposes writes into it
    return replace(program, module=module, inputs=inputs, ranges=ranges, reductions=None)


@contextmanager
def with_usual_sizes(
    exported: ExportedProgram, program: Program, profiles: Mapping[str, Profile]
) -> Iterator[None]:
    """Meanwhile the symbols' hints are the most frequent sizes, from which Torch-TensorRT makes its profiles."""
    hints: dict[Any, int] = {}
    for node, spec in zip(user_inputs(exported), program.inputs, strict=True):
        for size, axis in zip(node.meta["val"].shape, spec.axes, strict=True):
            if isinstance(axis, str):
                hints[size.node.expr] = profiles[axis].opt
                values = size.node.shape_env.backed_var_to_val
    if not hints:
        yield
        return
    kept = {symbol: values[symbol] for symbol in hints}
    values.update({symbol: sympy.Integer(size) for symbol, size in hints.items()})
    try:
        yield
    finally:
        values.update(kept)


def _size(program: Program, axis: str) -> int:
    return next(
        tensor.shape[spec.axes.index(axis)]
        for spec, tensor in zip(program.inputs, program.example, strict=True)
        if axis in spec.axes
    )


def _without(spec: TensorSpec, fixed: Mapping[str, int]) -> TensorSpec:
    return replace(spec, axes=tuple(fixed.get(a, a) if isinstance(a, str) else a for a in spec.axes))


def aten_program(program: Program) -> ExportedProgram:
    """``program`` with its token ops by their references; :data:`CONVERTED` and ``tokopt::expand_weight`` stay.

    Raises LoweringError for an op that cannot be.
    """
    for node in program.module.graph.nodes:
        if is_call(node, *UNSIGNED):
            raise LoweringError(
                f"{describe(node)} takes unsigned bytes, which TensorRT computes with nowhere; use int8_kv"
            )
    exported = assemble(symmetric_products(program)).run_decompositions(_references())
    graph = exported.graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if is_call(node, aten.sort):
            _spell_sort(node)
        elif is_call(node, aten.sym_size.int) and isinstance(node.meta["val"], int):
            node.replace_all_uses_with(cast(Node, node.meta["val"]))  # fx leaves a number in its place
        elif is_call(node, aten.cat.default):
            _drop_empty(node)
        elif is_call(node, aten.slice.Tensor):
            _spell_slice(node)
        elif is_call(node, aten.view.default, aten.reshape.default):
            _spell_sizes(node)
        elif node.target in PROMOTING:
            _promote(graph, node)
    graph.eliminate_dead_code()
    return exported


def _references() -> dict[Any, Callable[..., Any]]:
    """What every token op does, in operators of PyTorch that convert: there is no memory without values."""
    references = {
        getattr(ops, name).default: getattr(import_module(f"tokopt.kernels.{name}.reference"), name)
        for name in OPS
        if name not in CONVERTED
    }
    plain = {aten.max.dim: _largest, aten.cumsum.default: _cumsum, aten.empty_like.default: torch.zeros_like}
    return {**references, **plain}


def _largest(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """``aten.max.dim``, of which no converter gives both results."""
    return x.amax(dim, keepdim), x.argmax(dim, keepdim)


def _cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """``aten.cumsum`` by summing what comes before: TensorRT-RTX has no such layer, TensorRT a loop."""
    place = torch.arange(x.shape[dim], device=x.device)
    before = place[:, None] >= place
    rows = x.movedim(dim, -1)[..., None, :].to(dtype or (x.dtype if x.is_floating_point() else torch.int64))
    return (
        torch.where(before, rows, torch.zeros((), dtype=rows.dtype, device=x.device)).sum(-1).movedim(-1, dim)
    )


def _spell_sort(node: Node) -> None:
    """One spelling of ``sort``: its converter reads a second argument, and knows no stable form.

    TensorRT sorts by TopK, as the engines of the target tensorrt do.
    """
    stable = node.target == aten.sort.stable
    given = dict(zip(("dim", "descending"), node.args[1:], strict=False)) if not stable else node.kwargs
    x = node.args[0]
    assert isinstance(x, Node)
    rank = x.meta["val"].ndim
    dim = given.get("dim", -1)
    assert isinstance(dim, int)
    node.target, node.args, node.kwargs = (
        aten.sort.default,
        (x, dim % rank, given.get("descending", False)),
        {},
    )


def _spell_slice(node: Node) -> None:
    """Drop slices that take all, and count the others from the front: the converter miscounts those from the end."""
    x, dim, start, stop, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    assert isinstance(x, Node) and isinstance(dim, int)
    size = x.meta["val"].shape[dim]
    whole = (
        start in (0, None) and isinstance(stop, int | None) and (stop is None or stop >= ALL) and step == 1
    )
    if whole:
        node.replace_all_uses_with(x)
    elif isinstance(size, int) and isinstance(start, int | None) and isinstance(stop, int | None):
        first, last, _ = slice(start, stop).indices(size)
        node.args = (x, dim % x.meta["val"].ndim, first, max(first, last), step)


def _spell_sizes(node: Node) -> None:
    """A number in place of -1, where it is known: TensorRT derives no size from two that it does not know."""
    sizes, shape = node.args[1], node.meta["val"].shape
    assert isinstance(sizes, Sequence)
    pairs = zip(sizes, shape, strict=True)
    spelled = [known if given == -1 and isinstance(known, int) else given for given, known in pairs]
    node.update_arg(1, spelled)


def _drop_empty(node: Node) -> None:
    """Concatenate nothing that is empty: TensorRT takes a size of 0 for one to be copied."""
    parts, dim, *_ = *node.args, 0
    assert isinstance(parts, Sequence) and isinstance(dim, int)
    kept = [part for part in parts if not _is_empty(part, dim)]
    if len(kept) > 1:
        node.args = (kept, dim)
    elif kept and isinstance(kept[0], Node):
        node.replace_all_uses_with(kept[0])


def _is_empty(part: object, dim: int) -> bool:
    if not is_tensor(part):
        return False
    size = part.meta["val"].shape[dim]
    return isinstance(size, int) and size == 0


def _promote(graph: Graph, node: Node) -> None:
    """Bring tensors of another dtype to that of the result."""
    wanted = node.meta["val"].dtype
    for place, given in enumerate(node.args):
        if is_tensor(given) and given.meta["val"].dtype == torch.bool != wanted:
            with graph.inserting_before(node):
                cast = graph.call_function(aten._to_copy.default, (given,), {"dtype": wanted})
            cast.meta["val"] = given.meta["val"].to(wanted)
            node.update_arg(place, cast)
