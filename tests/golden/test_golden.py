"""What a pass of each family does to a small graph, as text: the listing before and after it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Node
from torch.fx.node import map_arg

import tokopt
from tests.zoo.blocks import FunctionalAttention, PreNormBlock
from tests.zoo.decoders import CONTEXT, VOCABULARY, HandWritten
from tests.zoo.entries import randomize
from tokopt.frontend.language import capture_lm
from tokopt.ir.bundle import Bundle
from tokopt.ir.export import axis_names, placeholders
from tokopt.ir.program import Program
from tokopt.runtime import Generation

UPDATE = "TOKOPT_UPDATE_GOLDEN"


def block() -> Bundle:
    """One block on 9 tokens."""
    model = randomize(PreNormBlock(16, 32, FunctionalAttention(16, 2)))
    return tokopt.capture(model, (torch.ones(2, 9, 16),))


def classifier() -> Bundle:
    """Two blocks on 9 tokens, and three classes of the first."""
    blocks = [PreNormBlock(16, 32, FunctionalAttention(16, 2)) for _ in range(2)]

    class First(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, 0]

    head = (torch.nn.LayerNorm(16), First(), torch.nn.Linear(16, 3))
    return tokopt.capture(randomize(torch.nn.Sequential(*blocks, *head)), (torch.ones(2, 9, 16),))


def decoder() -> Bundle:
    """One layer."""
    model = HandWritten(hidden=16, heads=2, layers=1).eval().requires_grad_(False)
    return capture_lm(model, generation=Generation(CONTEXT, VOCABULARY))


CASES: dict[str, tuple[Callable[[], Bundle], str]] = {
    "reduce": (block, "tome{r=3}"),
    "quantize": (block, "rtn{group=16 only=[mlp.0]}"),
    "cut": (decoder, "split{at=1}"),
    "exit": (classifier, "exit{after=[1] threshold=0.5 fit=own}"),
    "kv": (decoder, "tova{budget=8 sinks=1 recent=2}"),
}


def listing(program: Program) -> str:
    """One line per node: its number, what it calls, its operands in order, and its value's dtype and shape."""
    nodes = placeholders(program.module)
    numbers = {node: spec.name for node, spec in zip(nodes, program.inputs, strict=True)}
    names = axis_names(nodes, program.inputs)
    lines = [f"input {spec}" for spec in program.inputs]
    for node in program.module.graph.nodes:
        if node.op == "output":
            lines.append(f"return {_operands(node.args[0], numbers)}")
        elif node.op == "get_attr":
            numbers[node] = str(node.target)
        elif node.op == "call_function":
            target = getattr(node.target, "__name__", str(node.target))
            operands = _operands((*node.args, *node.kwargs.values()), numbers)
            numbers[node] = f"%{len(lines) - len(nodes)}"
            lines.append(f"{numbers[node]} = {target}{operands} -> {_kind(node.meta['val'], names)}")
    return "\n".join(lines)


def _operands(args: Any, numbers: dict[Node, str]) -> str:
    spelled = repr(map_arg(tuple(args), lambda node: f"<{numbers[node]}>"))  # type: ignore[arg-type]
    return re.sub(r"'<(.*?)>'", r"\1", spelled)


def _kind(value: Any, names: dict[str, str]) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(_kind(one, names) for one in value)
    if not isinstance(value, torch.Tensor):
        return "size"
    shape = [re.sub(r"\bs\d+\b", lambda symbol: names[symbol[0]], str(size)) for size in value.shape]
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(shape)}]"


def text(bundle: Bundle) -> str:
    return "\n\n".join(f"# program {name}\n{listing(program)}" for name, program in bundle.programs.items())


@pytest.mark.parametrize("family", CASES)
def test_a_small_graph_before_and_after(family: str) -> None:
    make, passes = CASES[family]
    bundle = make()
    made = f"## before\n\n{text(bundle)}\n\n## after {passes}\n\n{text(tokopt.optimize(bundle, passes))}\n"
    file = Path(__file__).with_name(f"{family}.txt")
    if os.environ.get(UPDATE):
        file.write_text(made, encoding="utf-8")
    assert file.read_text(encoding="utf-8") == made, f"if that is meant, run this test with {UPDATE}=1"
