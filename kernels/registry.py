"""Registers the token ops with torch, and collects their ONNX forms; a new op is a folder ``kernels/<op>/``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from tokopt.kernels import cuda
from tokopt.kernels.catalogue import CUDA_OPS, OPS
from tokopt.kernels.declaration import Op

if TYPE_CHECKING:
    import onnx_ir as ir


def _register(name: str) -> None:
    reference = import_module(f"tokopt.kernels.{name}.reference")
    op = torch.library.custom_op(f"tokopt::{name}", getattr(reference, name), mutates_args=())
    op.register_fake(reference.fake)
    if name in CUDA_OPS and cuda.available():
        op.register_kernel("cuda")(cuda.implementation(name))


for _name in OPS:
    _register(_name)

ops = torch.ops.tokopt
"""The registered ops: ``ops.log_size(size)`` is ``torch.ops.tokopt.log_size(size)``."""

_DECLARED = {getattr(ops, name): op for name, op in OPS.items()}


def declared(target: object) -> Op | None:
    """What the token op that a node's ``target`` calls declares of itself; None for any other target.

    >>> declared(ops.keep_slots.default).choice
    Choice(prefix=None, by_rank=False)
    """
    return _DECLARED.get(getattr(target, "overloadpacket", target))


def onnx_translations() -> dict[Callable, Callable]:
    """How to write every op as ONNX nodes, for ``torch.onnx.export(custom_translation_table=...)``.

    The exported model has nodes of the domain ``tokopt`` and no bodies for them yet: see
    :func:`attach_functions`.
    """
    return {getattr(ops, name).default: _onnx_form(name).translation for name in OPS}


def attach_functions(model: ir.Model) -> None:
    """Add to an ONNX ``model``, in place, the bodies of the ``tokopt`` functions that it calls.

    The bodies are standard ops of opset 23, so that any ONNX runtime of that opset executes the model; one
    that writes a cache in place takes ``TensorScatter`` and makes the whole model opset 24.

    >>> program = torch.onnx.export(
    ...     exported, opset_version=23, custom_translation_table=onnx_translations()
    ... )  # doctest: +SKIP
    >>> attach_functions(program.model)  # doctest: +SKIP
    """
    from onnx_ir.serde import deserialize_function

    forms = {function.name: function for name in OPS for function in _onnx_form(name).FUNCTIONS}
    called = _called(model.graph)
    while called := called - {name for _, name, _ in model.functions}:
        body = deserialize_function(forms[min(called)].to_function_proto())
        model.functions[body.identifier()] = body
        if inner := _called(body):
            body.opset_imports.setdefault("tokopt", 1)  # onnxscript forgets it for calls in branches
        called |= inner
    # Ops that are in both opsets mean the same in both; an engine wants one version throughout.
    newest = max([model.opset_imports[""], *(body.opset_imports[""] for body in model.functions.values())])
    for part in (model.graph, *model.functions.values()):
        part.opset_imports[""] = newest


def _called(part: ir.Graph | ir.Function) -> set[str]:
    """The names of the ``tokopt`` functions that a graph, or the body of one, calls."""
    return {node.op_type for node in part.all_nodes() if node.domain == "tokopt"}


def _onnx_form(name: str) -> ModuleType:
    return import_module(f"tokopt.kernels.{name}.onnx")
