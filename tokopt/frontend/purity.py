"""What is captured is a function of its inputs: it draws no random numbers and keeps nothing between calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from tokopt.errors import CaptureError
from tokopt.ir.graph import describe
from tokopt.ir.program import Program
from tokopt.lower.parity.precision import half_precision_limit
from tokopt.runtime.numerics import check_output

Result = TypeVar("Result")

_SWITCHES = ("train", "training")
"""Arguments that turn an operator's random numbers off when they are False."""

_SHARES = ("p", "dropout", "dropout_p")
"""Arguments that turn them off when they are 0."""


def refuse_random(module: GraphModule, model: str) -> None:
    """Raise CaptureError for a graph, or a branch in it, that draws random numbers which something reads."""
    for part in module.modules():
        if isinstance(part, GraphModule):
            for node in part.graph.nodes:
                if _draws(node) and (node.users or _writes(node)):
                    raise CaptureError(
                        f"{model} draws random numbers: {describe(node)}; turn them off in evaluation mode "
                        "(training=self.training, model.eval() before torch.export), or pass them in as an input"
                    )


def _draws(node: Node) -> bool:
    """Whether a node's value differs from call to call."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = _arguments(node, target)
    return all(given.get(name, True) for name in _SWITCHES) and all(given.get(name, 1) for name in _SHARES)


def _arguments(node: Node, target: torch._ops.OpOverload) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    schema = target._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given |= {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    return given | node.kwargs


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def run_unchanged(model: nn.Module, call: Callable[[], Result]) -> Result:
    """What a call of a model gives; raises CaptureError where calls change the model's parameters or buffers.

    The first call may, since some models fill their tables when they are first called.
    """
    changed: str | None = None
    for _ in range(2):
        before = _state(model)
        result = call()
        changed = _changed(before, _state(model))
        if changed is None:
            return result
    raise CaptureError(
        f"{type(model).__name__} changes its buffer {changed!r} whenever it is called; capture takes models that keep "
        "nothing between calls, so pass the buffer in and return it"
    )


State = dict[str, tuple[Tensor, int]]
"""Parameters and buffers, and how often each was written to."""


def _changed(before: State, after: State) -> str | None:
    """The first tensor that was written to, or replaced by another value."""
    for name, (tensor, writes) in after.items():
        known, known_writes = before.get(name, (None, 0))
        if known is tensor:
            if writes != known_writes:
                return name
        elif known is None or known.dtype != tensor.dtype or not torch.equal(known, tensor):
            return name
    return None


def _state(model: nn.Module) -> State:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor, 0 if tensor.is_inference() else tensor._version) for name, tensor in named}


def check_captured(program: Program, wanted: Sequence[Tensor], model: str) -> None:
    """Raise CaptureError when a program does not give what the model itself gave on the program's example."""
    half = half_precision_limit(program)
    for spec, want, got in zip(program.outputs, wanted, program(*program.example), strict=True):
        limit = half if half is not None and want.is_floating_point() else None
        check = check_output(spec.name, _array(want), _array(got), limit)
        if not check.ok:
            raise CaptureError(
                f"the captured graph of {model} does not give what the model gives on the example inputs (output "
                f"{spec.name!r}, NMSE {check.nmse:.2g}); the model must be a function of its inputs alone, without "
                "Python's random numbers and without counters"
            )


def _array(value: Tensor) -> np.ndarray:
    """The values in a dtype that numpy has."""
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True)
