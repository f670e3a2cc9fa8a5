"""An exported program as an ONNX model, by torch's own translation of every operator.

``torch.onnx.export`` does the same, and takes four times as long: it reads the signatures of all the operators that it
knows anew for every program, and runs the program again on tensors without data to learn which operands have to be
promoted to another dtype, which the dtypes of the operands say by themselves.
"""

# torch leaves these parts untyped, and has no public way to reach them one by one.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import onnx
import onnx_ir as ir
import torch
from onnxscript import version_converter
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.fx import GraphModule, traceback
from torch.fx.experimental import _config
from torch.onnx._internal.exporter import _core, _decomp, _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes import type_promotion

import tokopt.kernels


def translate(program: ExportedProgram, opset: int) -> ir.Model:
    """The program in operators of an opset of ONNX and in functions of the domain ``tokopt``.

    Raises :class:`torch.onnx.errors.OnnxExporterError` when an operator has no ONNX form.
    """
    settings: Any = _config
    with settings.patch(backed_size_oblivious=True):  # a size of one is like any other
        program = program.run_decompositions(dict(_decompositions(opset)))
        for module in program.graph_module.modules():
            assert isinstance(module, GraphModule)
            _promote(module)
        _fx_passes.remove_assertion_nodes(program.graph_module)
        with _signatures_once():
            model = _core._exported_program_to_onnx_program(program, registry=_registry(opset)).model
    version_converter.convert_version(model, opset, fallback=True)
    return model


@contextmanager
def _signatures_once() -> Iterator[None]:
    """Let the signature of an operator of ONNX be made once; torch makes it anew whenever one is called."""
    made = ir.schemas.OpSignature.from_op_schema
    known: dict[tuple[str, str, int], ir.schemas.OpSignature] = {}

    def once(schema: onnx.defs.OpSchema) -> ir.schemas.OpSignature:
        key = schema.domain, schema.name, schema.since_version
        if key not in known:
            known[key] = made(schema)
        return known[key]

    with patch.object(ir.schemas.OpSignature, "from_op_schema", once):
        yield


@cache
def _registry(opset: int) -> ONNXRegistry:
    """The ONNX form of every operator, those of tokopt among them."""
    registry = ONNXRegistry.from_torchlib(opset)
    for target, form in tokopt.kernels.onnx_translations().items():
        registry.register_op(target, form, is_complex=False)
    return registry


@cache
def _decompositions(opset: int) -> Mapping[Any, Callable[..., Any]]:
    """What operators without an ONNX form consist of."""
    known = set(_decomp.get_onnx_implemented_overloads(_registry(opset)))
    return _decomp.create_onnx_friendly_decomposition_table(known)


@cache
def _rules() -> type_promotion.TypePromotionTable:
    return type_promotion.TypePromotionTable()


def _promote(module: GraphModule) -> None:
    """Make every promotion of an operand to another dtype a node of its own, in place."""
    rules = _rules()
    known = {node: node.meta.get("val") for node in module.graph.nodes}
    mode = detect_fake_mode(list(known.values()))
    if mode is None:
        return
    interpreter = type_promotion._TypePromotionInterpreter(module, rules)
    interpreter.env = known
    with torch.no_grad(), mode, enable_python_dispatcher(), traceback.preserve_node_meta():
        for node in list(known):
            rule = type_promotion.get_type_promotion_rule(node, rules)
            if rule is not None:
                with interpreter._set_current_node(node):
                    interpreter._maybe_promote_node(node, rule)
