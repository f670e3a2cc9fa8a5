"""What a function of tensors does, as a graph that is copied into another."""

# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx._symbolic_trace import _Patcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols


def trace(function: Callable[..., Any], values: Sequence[Any], **options: Any) -> GraphModule:
    """What a function does to values without data; ``options`` are those of ``make_fx``.

    To be called in the mode of the values. The function calls no modules: fx would patch ``nn.Module`` for them, four
    times per trace, and each time Python visits every subclass that there is.
    """
    code = _use_lazy_graph_module(True)  # nobody calls what is copied into another graph
    with code, patch.object(_Patcher, "patch_method"), torch.no_grad(), enable_python_dispatcher():
        return make_fx(function, tracing_mode="real", **options)(*_distinct(values))


def makes_symbols(module: GraphModule) -> bool:
    """Whether a graph has a size that depends on data and is not its operands', so that it stands for no other."""
    values = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    known = free_unbacked_symbols(values)
    return any(free_unbacked_symbols(node.meta.get("val")) - known for node in module.graph.nodes)


def _distinct(values: Sequence[Any]) -> list[Any]:
    """The values, none of them twice: tracing knows a tensor by its identity, and takes two operands for one.

    Results of one trace may stand for those of several calls.
    """
    made: list[Any] = []
    for value in values:
        known = isinstance(value, Tensor) and any(value is other for other in made)
        made.append(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype) if known else value)
    return made
