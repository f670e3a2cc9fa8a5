"""All stages of a model with exits as one ONNX graph for a batch of one, in nested ``If``.

It is for hosts that call one program. What is in a branch is the graph of its stage as it was lowered, under names of
its own, and its weights stay where they are in the external data. So the file adds graphs and no weights, and gives
what the stages give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from tokopt import __version__
from tokopt.errors import LoweringError
from tokopt.ir.bundle import Bundle, fresh
from tokopt.ir.program import AxisRange, TensorSpec
from tokopt.lower.onnx.export import write_checked
from tokopt.runtime.encode import encode
from tokopt.runtime.engines.onnxruntime import Sessions
from tokopt.runtime.format.entries import PORTABLE, Manifest, ProgramEntry
from tokopt.runtime.format.link import Port
from tokopt.runtime.format.schedule import Entry
from tokopt.runtime.format.signature import BATCH, find_role, with_role
from tokopt.runtime.numerics import LIMITS, check_output


@dataclass(frozen=True)
class Whole:
    """The program ``name`` of a manifest, an input of one row, and what the exported stages make of it."""

    name: str
    entry: ProgramEntry
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]

    def listed(self, manifest: Manifest) -> Manifest:
        """The manifest with this program."""
        programs = {**manifest.programs, self.name: self.entry}
        return replace(manifest, programs=programs, schedule=replace(manifest.schedule, whole=self.name))


def lower_whole(
    bundle: Bundle, folder: Path, files: Mapping[str, Mapping[str, str]], metadata: Mapping[str, str]
) -> Whole | None:
    """Write the whole beside the stages of a bundle with exits, and check the file; None where there is no such thing.

    ``files`` are those of the stages. Raises LoweringError when the file is no valid ONNX graph.
    """
    entries = tuple(bundle.schedule.of_role("encode"))
    if not bundle.exits or bundle.states or not entries[-1].depth:
        return None
    if any(bundle.programs[entry.program].ranges[BATCH].min > 1 for entry in entries):
        return None
    name = fresh("whole", bundle.programs)
    last = bundle.programs[entries[-1].program]
    taken = [*bundle.inputs, *(spec.name for spec in last.outputs)]
    depth = TensorSpec(fresh("depth", taken), "int64", (BATCH,), "depth")
    outputs = (*with_role(last.outputs, "output"), depth)
    stages = _Stages(bundle, entries, {key: folder / forms[PORTABLE] for key, forms in files.items()})
    model = stages.model(name, outputs)
    model.producer_name, model.producer_version = "tokopt", __version__
    model.metadata_props.update(metadata)
    path = folder / f"{name}.onnx"
    write_checked(model, path, "all stages")
    ranges = {
        axis: bounds for entry in entries for axis, bounds in bundle.programs[entry.program].ranges.items()
    }
    inputs = tuple(bundle.inputs.values())
    used = {axis for spec in inputs for axis in spec.axes}
    ranges = {axis: bounds for axis, bounds in ranges.items() if axis in used} | {BATCH: AxisRange(1, 1)}
    entry = ProgramEntry(inputs, outputs, ranges, {PORTABLE: path.name})
    row = {key: _rows(spec, bundle.example[key], 0) for key, spec in bundle.inputs.items()}
    staged = bundle.staged(row)
    made = (*(staged.outputs[spec.name] for spec in outputs[:-1]), staged.depths)
    return Whole(name, entry, tuple(row.values()), made)


def check_whole(bundle: Bundle, folder: Path, manifest: Manifest) -> None:
    """Compare the whole with the stages, row by row of the example, on ONNX Runtime; raises LoweringError."""
    whole = manifest.schedule.whole
    assert whole is not None
    sessions = Sessions(folder, manifest, kernels=False, spins=False)
    depth = find_role(manifest.programs[whole].outputs, "depth")
    assert depth is not None
    example = bundle.example
    for row in range(_batch(bundle)):
        feed = {key: _rows(spec, example[key], row).numpy(force=True) for key, spec in bundle.inputs.items()}
        got, want = sessions.run(whole, feed), encode(manifest, sessions, feed, 1)
        assert want.depths is not None
        if got[depth.name].tolist() != want.depths.tolist():
            raise LoweringError(
                f"row {row} of the example leaves the whole after {got[depth.name][0]} blocks and the stages after "
                f"{want.depths[0]}"
            )
        for name, value in want.outputs.items():
            found = check_output(name, value, got[name], LIMITS.get(str(value.dtype), 0.0))
            if not found.ok:
                raise LoweringError(f"the whole differs from the stages in {name!r}: NMSE {found.nmse:.2g}")


def _batch(bundle: Bundle) -> int:
    return next(
        value.shape[spec.axes.index(BATCH)]
        for spec, value in zip(bundle.inputs.values(), bundle.example.values(), strict=True)
        if BATCH in spec.axes
    )


def _rows(spec: TensorSpec, value: torch.Tensor, row: int) -> torch.Tensor:
    """One row of an input."""
    return value.narrow(spec.axes.index(BATCH), row, 1) if BATCH in spec.axes else value


@dataclass
class _Body:
    """The nodes and initializers of a stage, and its outputs by name."""

    nodes: list[ir.Node]
    initializers: list[ir.Value]
    outputs: dict[str, ir.Value] = field(default_factory=dict[str, ir.Value])


class _Stages:
    """The stages of a bundle, put into each other."""

    def __init__(self, bundle: Bundle, entries: Sequence[Entry], paths: Mapping[str, Path]) -> None:
        self.bundle, self.entries = bundle, entries
        self.models = [ir.load(paths[entry.program]) for entry in entries]
        self.callers: dict[str, ir.Value] = {}

    def model(self, name: str, outputs: Sequence[TensorSpec]) -> ir.Model:
        """The graph of the first stage, in which the others lie; its outputs have these names."""
        for spec in self.bundle.inputs.values():
            known = (
                value for model in self.models for value in model.graph.inputs if value.name == spec.name
            )
            given = next(known)
            self.callers[spec.name] = ir.Value(name=spec.name, type=given.type, shape=ir.Shape(spec.axes))
        body = self._from(0, {}, [spec.name for spec in outputs[:-1]])
        results = list(body.outputs.values())
        for value, spec in zip(results, outputs, strict=True):
            value.name = spec.name
            value.shape = ir.Shape(spec.axes)
        opsets = {
            domain: max(model.opset_imports.get(domain, 0) for model in self.models)
            for model in self.models
            for domain in model.opset_imports
        }
        graph = ir.Graph(
            list(self.callers.values()),
            results,
            nodes=body.nodes,
            initializers=body.initializers,
            opset_imports=opsets,
            name=name,
        )
        functions = {key: function for model in self.models for key, function in model.functions.items()}
        version = max(model.ir_version for model in self.models)
        return ir.Model(graph, ir_version=version, functions=list(functions.values()))

    def _from(self, place: int, linked: dict[Port, ir.Value], names: Sequence[str]) -> _Body:
        """The stage at ``place`` and all after it: its outputs are those of these names, and the depth."""
        entry, program = self.entries[place], self.bundle.programs[self.entries[place].program]
        body = self._moved(place, linked)
        depth = _constant(np.array([entry.depth], np.int64), f"stage_{place}/depth")
        own = [*(body.outputs[name] for name in names), depth.outputs[0]]
        done = find_role(program.outputs, "done")
        if done is None and place + 1 == len(self.entries):
            return _Body([*body.nodes, depth], body.initializers, {value.name or "": value for value in own})
        linked = {
            **linked,
            **{
                link.target: body.outputs[link.source.name]
                for link in self.bundle.links
                if link.source.program == entry.program
            },
        }
        rest = self._from(place + 1, linked, names)
        if done is None:
            return _Body(body.nodes + rest.nodes, body.initializers + rest.initializers, rest.outputs)
        copies = [_copy(value, f"stage_{place}/left_{i}") for i, value in enumerate(own[:-1])]
        left = [*(node.outputs[0] for node in copies), depth.outputs[0]]
        leaving = ir.Graph([], left, nodes=[*copies, depth], name=f"after {entry.depth}")
        results = list(rest.outputs.values())
        going = ir.Graph(
            [], results, nodes=rest.nodes, initializers=rest.initializers, name=f"beyond {entry.depth}"
        )
        row = ir.node("Squeeze", [body.outputs[done.name]], name=f"stage_{place}/row")
        row.outputs[0].name = f"stage_{place}/row"
        branches = {"then_branch": leaving, "else_branch": going}
        chosen = ir.node("If", [row.outputs[0]], branches, num_outputs=len(own), name=f"stage_{place}/exit")
        for i, (value, out) in enumerate(zip(own, chosen.outputs, strict=True)):
            out.name, out.type, out.shape = f"stage_{place}/result_{i}", value.type, value.shape
        outputs = {value.name or "": value for value in chosen.outputs}
        return _Body([*body.nodes, row, chosen], body.initializers, outputs)

    def _moved(self, place: int, linked: Mapping[Port, ir.Value]) -> _Body:
        """The graph of a stage, taken out of its model: it reads callers' inputs and links, under names of its own."""
        graph, program = self.models[place].graph, self.bundle.programs[self.entries[place].program]
        outputs = {value.name or "": value for value in graph.outputs}
        for spec, value in zip(program.inputs, list(graph.inputs), strict=True):
            outer = (
                self.callers[spec.name]
                if spec.role == "input"
                else linked[Port(self.entries[place].program, spec.name)]
            )
            ir.convenience.replace_all_uses_with(value, outer)
        initializers = list(graph.initializers.values())
        graph.outputs.clear()
        for node in list(graph):
            source = node.inputs[0] if node.op_type == "Identity" and not node.domain else None
            if source is not None and source.producer() in list(
                graph
            ):  # engines warn of copies that branches read
                copy = node.outputs[0]
                ir.convenience.replace_all_uses_with(copy, source)
                outputs = {key: source if value is copy else value for key, value in outputs.items()}
                graph.remove(node)
        nodes = list(graph)
        for node in nodes:
            if node.name:
                node.name = f"stage_{place}/{node.name}"
        inner = [value for node in ir.traversal.RecursiveGraphIterator(graph) for value in node.outputs]
        for value in inner:
            value.name = f"stage_{place}/{value.name}"
        graph.initializers.clear()
        for value in initializers:
            value.name = f"stage_{place}/{value.name}"
            if value.const_value is not None:
                value.const_value.name = value.name
        graph.remove(nodes)
        return _Body(nodes, initializers, outputs)


def _constant(array: np.ndarray, name: str) -> ir.Node:
    node = ir.node("Constant", [], {"value": ir.tensor(array, name=name)}, name=name)
    node.outputs[0].name = name
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape(array.shape)
    return node


def _copy(value: ir.Value, name: str) -> ir.Node:
    node = ir.node("Identity", [value], name=name)
    node.outputs[0].name, node.outputs[0].type = name, value.type
    node.outputs[0].shape = value.shape
    return node
