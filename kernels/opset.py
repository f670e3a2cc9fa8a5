"""What the ONNX forms share: the domain they define and the standard opset they are written in.

``torch.onnx.export`` inlines every model-local function while it converts opset versions. So its translation
table gets bare nodes of the domain (:func:`node`), and the bodies are attached to the finished model
(:func:`tokopt.kernels.attach_functions`).

The annotations of a scripted function say what is an input (a tensor type; ``r`` is one, since it may be
computed from a dynamic shape), what is an attribute (``int``, ``float``), and how many outputs there are.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any, get_args, get_type_hints

import onnx_ir as ir
from onnx.defs import OpSchema
from onnxscript import BOOL, FLOAT, INT8, INT64, UINT8, OnnxFunction, script, values
from onnxscript import FLOAT8E4M3FN as FLOAT8
from onnxscript.onnx_opset import opset23
from onnxscript.onnx_types import TensorType

from tokopt.kernels.plugins import NotAPlugin

__all__ = [
    "BOOL",
    "FLOAT",
    "FLOAT8",
    "INFINITY",
    "INT8",
    "INT64",
    "LAST",
    "TOKOPT",
    "UINT8",
    "Given",
    "TensorType",
    "maker",
    "node",
    "op",
    "op24",
    "script",
]

TOKOPT = values.Opset("tokopt", 1)
"""The domain of the model-local functions."""

op: Any = opset23
"""The standard ops; untyped, since a scripted function mixes tensors with Python numbers that it promotes."""

op24: Any = values.Opset("", 24)
"""Standard ops that opset 23 lacks; a model that calls a function written with them is of opset 24."""

INFINITY = float("inf")

LAST = [2**63 - 1]
"""The end of a slice that runs to the end of its axis."""

Given = Mapping[str, ir.Value | str | None]
"""What a function is called with; None where the node leaves something out.

An op whose function gets some arguments by way of other functions has ``arguments(given)`` in its ``onnx.py``:
those arguments, by the names of the reference.
"""

_TENSORS = {
    FLOAT: "tensor(float)",
    INT64: "tensor(int64)",
    BOOL: "tensor(bool)",
    INT8: "tensor(int8)",
    UINT8: "tensor(uint8)",
}
_ATTRIBUTES = {int: OpSchema.AttrType.INT, float: OpSchema.AttrType.FLOAT}
_ANY = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)", "tensor(double)", "tensor(bool)"]
_ANY += [f"tensor({sign}int{bits})" for sign in ("", "u") for bits in (8, 16, 32, 64)]


def node(function: OnnxFunction) -> Callable:
    """A translation that records a bare call of ``function``: a node of its name, without its body."""
    hints = get_type_hints(function.function)
    returned = hints.pop("return")
    schema = OpSchema(
        function.name,
        TOKOPT.domain,
        TOKOPT.version,
        inputs=[
            OpSchema.FormalParameter(name, _TENSORS.get(kind, "T"))
            for name, kind in hints.items()
            if kind not in _ATTRIBUTES
        ],
        outputs=[
            OpSchema.FormalParameter(f"output_{position}", _TENSORS.get(kind, "T"))
            for position, kind in enumerate(get_args(returned) or (returned,))
        ],
        type_constraints=[("T", _ANY, "any tensor")],
        attributes=[
            OpSchema.Attribute(name, _ATTRIBUTES[kind], required=True)
            for name, kind in hints.items()
            if kind in _ATTRIBUTES
        ],
    )
    call = values.Op(TOKOPT, function.name, schema)

    @wraps(function.function)
    def record(*args, **kwargs):
        # By name: a schema keeps its attributes in alphabetical order.
        return call(**signature(record).bind(*args, **kwargs).arguments)

    return record


def maker(value: ir.Value | str | None) -> ir.Node:
    """The call of one of the domain's functions that made ``value``; raises NotAPlugin where that is another op."""
    found = value.producer() if isinstance(value, ir.Value) else None
    if found is None or found.domain != TOKOPT.domain:
        raise NotAPlugin("the functions that it is composed of were changed")
    return found
