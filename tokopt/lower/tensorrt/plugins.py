"""Token ops as chains of TensorRT plugins, in the place of their model-local functions."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from importlib import import_module

import onnx_ir as ir
import torch

from tokopt.kernels.opset import TOKOPT, Given
from tokopt.kernels.plugins import PLUGIN_OPS, Described, Launch, NotAPlugin, plugin_code, trace
from tokopt.lower.onnx.real_tokens import plain_name
from tokopt.lower.onnx.weights import take_over
from tokopt.runtime.format.manifest import PluginEntry

DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.BOOL: torch.bool,
}

Argument = ir.Value | int | float | str


def use_plugins(model: ir.Model) -> list[str]:
    """Write every token op that can be as nodes ``tokopt::<op>_<kernel>``, in place.

    What cannot keeps its function. Returns the reasons.
    """
    refused = []
    for node in list(model.graph.all_nodes()):
        op = plain_name(node)
        if node.domain == TOKOPT.domain and op in PLUGIN_OPS:
            try:
                _replace(node, op, _arguments(model, node, op))
            except NotAPlugin as reason:
                refused.append(f"{op} {node.name}: {reason}")
    return refused


def used_plugins(model: ir.Model, arch: str) -> tuple[PluginEntry, ...]:
    """The plugins that a model calls, with the hashes of their code for a compute capability."""
    entries = set()
    for node in model.graph.all_nodes():
        op = next((op for op in PLUGIN_OPS if node.op_type.startswith(f"{op}_")), None)
        if op is not None and node.domain == TOKOPT.domain and "launch" in node.attributes:
            scalar = Launch.from_json(node.attributes["launch"].as_string()).scalar
            digest = hashlib.sha256(plugin_code(op, scalar, arch)).hexdigest()
            entries.add(PluginEntry(f"{TOKOPT.domain}::{node.op_type}", digest))
    return tuple(sorted(entries, key=lambda entry: (entry.name, entry.sha256)))


def _arguments(model: ir.Model, node: ir.Node, op: str) -> dict[str, Argument]:
    """What the op is called with, by the names of its reference."""
    function = model.functions[node.op_identifier()]
    names = (str(parameter.name) for parameter in function.inputs)
    given: Given = dict(zip(names, node.inputs, strict=True))
    composed = getattr(import_module(f"tokopt.kernels.{op}.onnx"), "arguments", None)
    given = {**given, **(composed(given) if composed is not None else {})}
    reference = getattr(import_module(f"tokopt.kernels.{op}.reference"), op)
    found: dict[str, Argument] = {}
    for name, parameter in inspect.signature(reference).parameters.items():
        value = given.get(name)
        if isinstance(value, str):
            found[name] = value
        elif value is None:
            found[name] = node.attributes[name].value
        elif parameter.annotation is int:
            constant = ir.convenience.get_const_tensor(value)
            if constant is None:
                raise NotAPlugin(f"its {name} is computed from sizes of the inputs")
            found[name] = int(constant.numpy().item())
        else:
            found[name] = value
    return found


def _replace(node: ir.Node, op: str, arguments: Mapping[str, Argument]) -> None:
    """Put the chain of kernels before ``node``, whose outputs it takes over."""
    values = {name: value for name, value in arguments.items() if isinstance(value, ir.Value)}
    described = {name: _described(v) if isinstance(v, ir.Value) else v for name, v in arguments.items()}
    launches, results = trace(op, described)
    for launch in launches:
        made = ir.node(
            f"{op}_{launch.kernel}",
            [values[name] for name in launch.inputs],
            attributes={"launch": launch.to_json()},
            domain=TOKOPT.domain,
            num_outputs=len(launch.outputs),
            name=f"{node.name}_{launch.kernel}",
        )
        made.metadata_props.update(node.metadata_props)
        assert node.graph is not None
        node.graph.insert_before(node, made)
        for output, value in zip(launch.outputs, made.outputs, strict=True):
            value.name = f"{node.name}_{output.name}"
            values[output.name] = value
    for old, name in zip(node.outputs, results, strict=True):
        values[name].type, values[name].shape = old.type, old.shape
        take_over(values[name], old)
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _described(value: ir.Value) -> Described:
    dtype = DTYPES.get(value.dtype) if value.dtype is not None else None
    if value.shape is None or dtype is None:
        raise NotAPlugin(
            f"TensorRT has no kernels for {value.name}, of {value.dtype} and the shape {value.shape}"
        )
    names = (
        size if isinstance(size, int) else size.value or f"{value.name}.{axis}"
        for axis, size in enumerate(value.shape)
    )
    return Described(dtype, tuple(names))
