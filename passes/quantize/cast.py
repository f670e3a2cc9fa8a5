"""Products in half precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from tokopt.analysis.blocks import find_sites
from tokopt.analysis.constants import parameter
from tokopt.analysis.linears import matches
from tokopt.analysis.weights import Weights
from tokopt.ir.bundle import Bundle
from tokopt.ir.graph import is_call
from tokopt.kernels import ops
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal, on_entries
from tokopt.rewrite.edit import after, call, close_graph, open_graph, put_parameter, redirect


@dataclass(frozen=True)
class Cast(Pass):
    """Linears and attention in ``dtype``; norms, sums and the residual stream stay in float32.

    Weights are stored in the dtype, operands are cast before each product and its result back. Inputs, outputs and
    state keep their dtypes, and attention over a cache keeps the cache's.

    Rules. Routers, whose outputs choose experts by rank, stay in float32, and weights of products that are no linears
    are refused. For engines with fast half-precision products: GPUs, and OpenVINO on CPUs with bfloat16. ONNX Runtime's
    CPU kernels are slower in float16 than in float32, and lack bfloat16 (export with ``check=False``).
    """

    dtype: Literal["float16", "bfloat16"] = "float16"
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    name: ClassVar[str] = "cast"

    @property
    def data_free(self) -> bool:
        """It reads dtypes alone."""
        return True

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Cast around every product whose operands are float32, in every program that the schedule runs."""
        result = on_entries(bundle, self._cast)
        if result.matches or result.refusals:
            return result
        return PassResult(bundle, 0, (), (Refusal("model", "there is no product in float32"),))

    def _cast(self, bundle: Bundle, name: str) -> PassResult:
        """Cast around the products of one program."""
        program = bundle.programs[name]
        module, dtype = open_graph(program), getattr(torch, self.dtype)
        graph, done = module.graph, 0
        weights = Weights.of(graph)
        refusals = [Refusal(one.path, one.reason) for one in weights.unknown(self.only, self.skip)]
        for linear in weights.linears:
            node = linear.node
            if not matches(linear.path, self.only, self.skip) or node.meta["val"].dtype != torch.float32:
                continue
            for place, operand in enumerate(node.args):
                if isinstance(operand, Node) and operand.op == "get_attr":
                    put_parameter(module, node, place, parameter(module, operand).to(dtype))
            self._cast_around(node, dtype)
            done += 1
        for site in find_sites(graph):
            cached = is_call(site.key, ops.cache_write)
            if (
                cached
                or site.node.meta["val"].dtype != torch.float32
                or not matches(site.path, self.only, self.skip)
            ):
                continue
            self._cast_around(site.node, dtype)
            done += 1
        changed = bundle.with_program(name, close_graph(program, module)) if done else bundle
        return PassResult(changed, done, weights.note, tuple(refusals))

    def _cast_around(self, node: Node, dtype: torch.dtype) -> None:
        """Float operands of a node to ``dtype``, its result back to float32."""
        graph = node.graph
        with graph.inserting_before(node):
            for place, operand in enumerate(node.args):
                if isinstance(operand, Node) and operand.op != "get_attr" and _is_float32(operand):
                    node.update_arg(place, call(graph, _to, operand, dtype, like=node))
            for name, operand in node.kwargs.items():
                if isinstance(operand, Node) and _is_float32(operand):
                    node.update_kwarg(name, call(graph, _to, operand, dtype, like=node))
        users = list(node.users)
        with after(node):
            back = call(graph, _to, node, torch.float32, like=node)
        redirect(users, node, back)


def _is_float32(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)
