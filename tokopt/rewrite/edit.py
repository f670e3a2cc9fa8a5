"""The edit loop that every pass is made of: open a Program, edit its graph, export it again.

An edit inserts calls to plain Python functions written in ordinary PyTorch; exporting again traces them and
derives every shape and the signature anew. The graph is traced through ``torch.fx.Interpreter`` with node
metadata preserved, so module paths and source lines of the user's model survive every pass.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.fx.traceback
from torch.fx import GraphModule, Node

from tokopt.analysis.graph import aten, dtype_name, is_call
from tokopt.ir.program import AxisRange, Program, TensorSpec


class _Retrace(torch.nn.Module):
    """Runs an edited graph under tracing; its parameters keep the names they had."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__()
        # Not a sub-module, or every re-export would put one more prefix before each parameter's name.
        self.__dict__["_traced"] = module
        for name, child in module.named_children():
            self.add_module(name, child)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.fx.traceback.preserve_node_meta():
            interpreter = torch.fx.Interpreter(self.__dict__["_traced"])
            # Flat in, flat out; the module's own calling convention is that of the unedited signature.
            return tuple(interpreter.run(*tensors, enable_io_processing=False))


Ranges = Mapping[str, AxisRange]


def export_flat(
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: tuple[TensorSpec, ...],
    ranges: Ranges,
    *,
    deferred: bool = False,
) -> tuple[torch.export.ExportedProgram, Ranges]:
    """``torch.export`` of a module that takes positional tensors and returns a tuple of tensors.

    Returns the ranges too, narrowed by the bounds that the model itself sets (a table of 512 positions, say).
    ``deferred`` turns guards that cannot be proved into run-time assertions.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                module,
                example,
                dynamic_shapes=_dynamic_shapes(inputs, ranges),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=deferred,
            )
        exported.graph.eliminate_dead_code()
        return exported, ranges
    except Exception as error:
        narrowed = _suggested_ranges(str(error), ranges)
        if narrowed == ranges:
            raise
    return export_flat(module, example, inputs, narrowed, deferred=deferred)


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


def reexport(program: Program, module: GraphModule, *, deferred: bool = False) -> Program:
    """The Program of an edited graph, with the same inputs; output axes are derived anew.

    ``deferred`` turns guards that cannot be proved into run-time assertions. It also forgets that axes of one
    name are equal, so only edits that need it should ask for it.
    """
    for node in list(module.graph.nodes):
        if is_call(node, aten._assert_tensor_metadata):  # what it asserts of dtypes, export derives anew
            module.graph.erase_node(node)
    _register_constants(module)
    module.graph.eliminate_dead_code()
    drop_unused(module)
    module.graph.lint()
    traced = _Retrace(module)
    exported, ranges = export_flat(traced, program.example, program.inputs, program.ranges, deferred=deferred)
    outputs = output_specs(exported, program)
    return replace(program, exported=exported, outputs=outputs, ranges=ranges, reductions=None)


def output_specs(exported: torch.export.ExportedProgram, program: Program) -> tuple[TensorSpec, ...]:
    """Output specs with axes read off the exported graph; a symbol is spelled by the input axis it came from."""
    names = axis_names(exported, program.inputs)
    outputs = exported.graph.output_node().args[0]
    assert isinstance(outputs, (tuple, list))
    specs = []
    for spec, node in zip(program.outputs, outputs, strict=True):
        assert isinstance(node, Node)
        value = node.meta["val"]
        axes = tuple(size if isinstance(size, int) else _spell(size, names) for size in value.shape)
        specs.append(replace(spec, axes=axes, dtype=dtype_name(value.dtype)))
    return tuple(specs)


def axis_names(exported: torch.export.ExportedProgram, inputs: tuple[TensorSpec, ...]) -> dict[str, str]:
    """Symbol (``"s77"``) -> the named axis of an input that it stands for."""
    user_inputs = set(exported.graph_signature.user_inputs)
    nodes = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name in user_inputs]
    names: dict[str, str] = {}
    for node, spec in zip(nodes, inputs, strict=True):
        for size, axis in zip(node.meta["val"].shape, spec.axes, strict=True):
            if isinstance(axis, str) and not isinstance(size, int):
                names[str(size)] = axis
    return names


def _spell(size: torch.SymInt, names: dict[str, str]) -> str:
    # A symbol may begin with another's name: s7 and s73.
    return re.sub(r"\bs\d+\b", lambda symbol: names.get(symbol[0], symbol[0]), str(size))


def call(graph: torch.fx.Graph, function: Callable, *args: object, like: Node, **kwargs: object) -> Node:
    """Insert a call of a plain function at the graph's insertion point, attributed to ``like``'s module."""
    node = graph.call_function(function, args, kwargs)  # type: ignore[arg-type]
    for key in ("nn_module_stack", "stack_trace"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    return node


def put_parameter(module: GraphModule, reader: Node, place: int | None, value: torch.Tensor) -> Node:
    """A new parameter of the module, read by argument ``place`` of ``reader`` (None: by nothing yet)."""
    before = reader.args[place] if place is not None else None
    stem = re.sub(r"_v\d+$", "", str(before.target)) if isinstance(before, Node) else reader.name
    name = stem.replace(".", "_")
    count = sum(1 for known in module._buffers if re.fullmatch(rf"{re.escape(name)}_v\d+", known))
    name = f"{name}_v{count + 1}"
    module.register_buffer(name, value.detach().contiguous())
    with module.graph.inserting_before(reader):
        node = module.graph.get_attr(name)
    node.meta["val"] = value
    if place is not None:
        reader.update_arg(place, node)
    return node


def _register_constants(module: GraphModule) -> None:
    """Make buffers of the constants that an export lifted; lifted again, they would get names that are not there."""
    for node in list(module.graph.nodes):
        if is_call(node, aten.lift_fresh_copy, aten.detach_) and node.args[0].op == "get_attr":
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            owner = module.get_submodule(path)
            if isinstance(value := owner.__dict__.get(name), torch.Tensor):
                delattr(owner, name)
                owner.register_buffer(name, value)


def drop_unused(module: GraphModule) -> None:
    """Delete the parameters and buffers that the graph does not read."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    held = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for target, _ in held:
        if target not in read:
            path, _, name = target.rpartition(".")
            delattr(module.get_submodule(path), name)
