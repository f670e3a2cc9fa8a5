"""The end of a model, what comes after its last block, as a program that any earlier block may be given.

A tail takes the residual stream and gives the model's own outputs. Where an output is the product of a last linear
layer, that layer's weight and bias are inputs; where it is not, an affine map with such inputs is put behind it. So one
tail serves every exit, each with a head of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.functional import linear

from tokopt.analysis.constants import evaluate
from tokopt.analysis.linears import Linear, as_linear, float_constants
from tokopt.errors import PassRefused
from tokopt.ir.bundle import fresh
from tokopt.ir.export import placeholders
from tokopt.ir.format import BATCH
from tokopt.ir.graph import aten, is_call, operand_at, reaches, results
from tokopt.ir.program import Program, TensorSpec
from tokopt.ir.shapes import Shapes
from tokopt.passes.exit.heads import Affine
from tokopt.rewrite.cut import Halves
from tokopt.rewrite.edit import after, call, close_graph, inline, open_graph, put_parameter

_SAME = (aten.dropout, aten.clone, aten.contiguous, aten.alias, aten.detach)
"""What leaves the values of a linear layer as they are."""


@dataclass(frozen=True)
class Fitted:
    """An output of the tail that a head is fitted to: its place, and the model's own head.

    The head is ``own``: the last linear layer, or, where there is none (``added``), the identity.
    """

    place: int
    own: Affine
    added: bool


@dataclass(frozen=True)
class Tail:
    """``program`` takes the stream, callers' inputs, and weight and bias of every head; see the module.

    It gives the model's outputs, ``outputs``, and behind them the features that every head reads.
    """

    program: Program
    stream: str
    outputs: tuple[TensorSpec, ...]
    fitted: tuple[Fitted, ...]

    @property
    def heads(self) -> int:
        """How many inputs are weights and biases of heads; they come last."""
        return 2 * len(self.fitted)


def find_tail(halves: Halves) -> Tail:
    """The tail of a program that was cut after its last block; raises PassRefused where there is no such thing."""
    program = halves.second
    if len(halves.links) > 1:
        raise PassRefused("what comes after the last block reads more of the model than the residual stream")
    edit = _HeadsAsInputs(program)
    edit.check(halves.stream)
    edit.put_heads()
    return edit.closed(halves.stream)


class _HeadsAsInputs:
    """Weights and biases of last layers become inputs."""

    def __init__(self, program: Program) -> None:
        self.program, self.module = program, open_graph(program)
        self.inputs, self.example = list(program.inputs), list(program.example)
        self.fitted: list[Fitted] = []
        self.features: list[Node] = []

    def check(self, stream: str) -> None:
        """Every output comes from the stream, with a row for each of its rows."""
        specs = zip(placeholders(self.module), self.inputs, strict=True)
        behind = reaches(next(node for node, spec in specs if spec.name == stream))
        for spec, node in zip(self.program.outputs, results(self.module.graph), strict=True):
            if spec.role != "output" or spec.axes[:1] != (BATCH,):
                raise PassRefused(f"output {spec.name!r} has no batch in front, by which rows could leave")
            if node not in behind:
                raise PassRefused(f"output {spec.name!r} does not come from the last block")

    def put_heads(self) -> None:
        """Last layers first: what is computed of their product, such as probabilities, follows it."""
        known = float_constants(self.module.graph)
        places = [place for place, spec in enumerate(self.program.outputs) if _may_fit(spec)]
        for place in places:
            product = _last_linear(results(self.module.graph)[place], known)
            if product is not None:
                self._put(place, product.node, product.input, self._own(product), added=False)
        done = set[Node]().union(*(reaches(node) for node in self._products())) | set(self._products())
        for place in places:
            node, spec = results(self.module.graph)[place], self.program.outputs[place]
            if node not in done:
                channels = spec.axes[-1]
                assert isinstance(channels, int)
                own = Affine(torch.eye(channels), torch.zeros(channels))
                self._put(place, node, node, own, added=True)

    def closed(self, stream: str) -> Tail:
        """The tail: the features of the heads are further outputs."""
        outputs = list(self.program.outputs)
        for _ in self.features:
            name = fresh("features", [spec.name for spec in outputs])
            outputs.append(TensorSpec(name, "float32", (), "output"))
        graph = self.module.graph
        graph.output_node().args = ((*results(graph), *self.features),)
        changes = {"inputs": tuple(self.inputs), "outputs": tuple(outputs), "example": tuple(self.example)}
        made = close_graph(self.program, self.module, **changes)
        return Tail(made, stream, self.program.outputs, tuple(self.fitted))

    def _products(self) -> list[Node]:
        """The nodes that multiply by a head so far."""
        heads = placeholders(self.module)[len(self.program.inputs) :]
        return [reader for head in heads for reader in head.users]

    def _put(self, place: int, old: Node, source: Node, own: Affine, *, added: bool) -> None:
        """Multiply ``source`` by a head that is an input; in place of ``old``, or behind it as the output."""
        graph, spec = self.module.graph, self.program.outputs[place]
        operands = [
            self._input(spec.dtype, word, value)
            for word, value in (("weight", own.weight), ("bias", own.bias))
        ]
        if added:
            with graph.inserting_before(graph.output_node()):
                made = call(graph, linear, source, *operands, like=old)
            outputs = results(graph)
            outputs[place] = made
            graph.output_node().args = (tuple(outputs),)
        else:
            with after(old):
                made = call(graph, linear, source, *operands, like=old)
            old.replace_all_uses_with(made)
        self.features.append(source)
        self.fitted.append(Fitted(place, own, added))

    def _input(self, dtype: str, word: str, value: Tensor) -> Node:
        taken = [spec.name for spec in (*self.inputs, *self.program.outputs)]
        spec = TensorSpec(fresh(word, taken), dtype, tuple(value.shape), "input")
        node = put_input(self.module, spec)
        self.inputs.append(spec)
        self.example.append(value.to(getattr(torch, dtype)))
        return node

    def _own(self, product: Linear) -> Affine:
        """The model's own last layer."""
        weight = product.matrix(self.module).float()
        if product.bias is None:
            return Affine(weight, torch.zeros(weight.shape[0]))
        return Affine(weight, evaluate(self.module, product.bias, {}).float())


def _may_fit(spec: TensorSpec) -> bool:
    """Whether a head may be fitted to an output: numbers with channels."""
    return spec.dtype.startswith("float") and len(spec.axes) > 1 and isinstance(spec.axes[-1], int)


def _last_linear(node: Node, known: set[Node]) -> Linear | None:
    """The linear layer whose product an output is."""
    while is_call(node, *_SAME):
        node = operand_at(node, 0)
    found = as_linear(node)
    if found is None or found.weight not in known or (found.bias is not None and found.bias not in known):
        return None
    return found


def put_input(module: GraphModule, spec: TensorSpec) -> Node:
    """A further input of an open graph, behind those that it has."""
    with module.graph.inserting_after(placeholders(module)[-1]):
        node = module.graph.placeholder(spec.name)
    node.meta["val"] = Shapes.attached(module).blank(spec)
    return node


def attach(
    module: GraphModule, program: Program, tail: Tail, stream: Node, heads: Sequence[Affine]
) -> list[Node]:
    """Put the tail with these heads, one for each of ``tail.fitted``, behind a stream of a program's open graph.

    The nodes of the model's outputs, and of every head's features.
    """
    own = len(tail.program.inputs) - tail.heads
    given = dict(zip((spec.name for spec in program.inputs), placeholders(module), strict=True))
    given[tail.stream] = stream
    operands = [given[spec.name] for spec in tail.program.inputs[:own]]
    output = module.graph.output_node()
    values = (value for head in heads for value in (head.weight, head.bias))
    for spec, value in zip(tail.program.inputs[own:], values, strict=True):
        operands.append(put_parameter(module, output, None, value.to(getattr(torch, spec.dtype))))
    with module.graph.inserting_before(output):
        made = inline(module.graph, tail.program, operands, like=stream)
    Shapes.attached(module).refresh(module)
    return made


@dataclass
class Attached:
    """An open stage with a tail at its end: the nodes of the model's outputs and of every head's features.

    ``stage`` has the outputs that it hands on, and neither of those.
    """

    stage: Program
    module: GraphModule
    outputs: Sequence[Node]
    features: Sequence[Node]

    def take(self, spec: TensorSpec, value: Tensor) -> Node:
        """A further input of the stage."""
        inputs, example = (*self.stage.inputs, spec), (*self.stage.example, value)
        self.stage = replace(self.stage, inputs=inputs, example=example)
        return put_input(self.module, spec)

    def closed(self, specs: Sequence[TensorSpec], nodes: Sequence[Node]) -> Program:
        """The stage with further outputs behind its own."""
        graph = self.module.graph
        graph.output_node().args = ((*results(graph), *nodes),)
        stage = self.stage
        return close_graph(
            stage,
            self.module,
            inputs=stage.inputs,
            outputs=(*stage.outputs, *specs),
            example=stage.example,
        )
