"""A program as a row of stages, with a probe or an exit at the end of all but the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tokopt.analysis.blocks import blocks_of
from tokopt.errors import PassError, PassRefused
from tokopt.ir.bundle import fresh
from tokopt.ir.format import BATCH, Link, Port
from tokopt.ir.program import Program, TensorSpec
from tokopt.passes.exit.heads import Affine
from tokopt.passes.exit.rules.base import Rule, Seen
from tokopt.passes.exit.tail import Tail, attach, find_tail
from tokopt.rewrite.cut import cut
from tokopt.rewrite.edit import call, open_graph, put_parameter


@dataclass(frozen=True)
class Decide:
    """What a rule does at the end of a stage, as a function that is traced."""

    rule: Rule
    threshold: float
    temperature: float

    def __call__(
        self, output: Tensor, features: Tensor, carried: list[Tensor], fitted: list[Tensor]
    ) -> list[Tensor]:
        """Which rows are done [batch], and what the next exit is told."""
        output = output.float()
        seen = Seen(output if self.temperature == 1 else output / self.temperature, features.float())
        score, told = self.rule.score(seen, carried, fitted)
        return [self.rule.leaves(score, self.threshold), *told]


@dataclass(frozen=True)
class Stages:
    """Stages without exits, by names, the depth of each, the links between them, and the tail for the early ones.

    ``streams`` are the outputs of the early stages that carry the residual stream.
    """

    programs: Mapping[str, Program]
    depths: tuple[int, ...]
    links: tuple[Link, ...]
    streams: tuple[str, ...]
    tail: Tail

    def probes(self) -> tuple[Mapping[str, Program], tuple[Link, ...]]:
        """The stages with the features of the model's own heads as outputs, and the links between them."""
        made = dict(self.programs)
        own = [one.own for one in self.tail.fitted]
        for name, stream in zip(self.programs, self.streams, strict=False):
            end = attach(self.programs[name], self.tail, stream, own)
            specs = [TensorSpec(f"features {i}", "float32", (), "output") for i in range(len(end.features))]
            made[name] = end.closed(self.programs[name], specs, end.features)
        return made, self.links

    def with_exits(
        self,
        rules: Sequence[Decide],
        heads: Sequence[Sequence[Affine]],
        fitted: Sequence[Tensor],
        decides: int,
    ) -> tuple[Mapping[str, Program], tuple[Link, ...]]:
        """The stages with exits, and the links between them, by which a rule may tell the next exit something."""
        made, links = dict(self.programs), list(self.links)
        told: dict[TensorSpec, Tensor] = {}
        before, last = "", len(self.streams) - 1
        place = self.tail.fitted[decides].place
        for i, (name, stream) in enumerate(zip(self.programs, self.streams, strict=False)):
            stage = self.programs[name]
            end = attach(stage, self.tail, stream, heads[i])
            carried = [end.take(spec, value) for spec, value in told.items()]
            links += [Link(Port(before, spec.name), Port(name, spec.name)) for spec in told]
            output = end.module.graph.output_node()
            own = [put_parameter(end.module, output, None, value) for value in fitted]
            with output.graph.inserting_before(output):
                operands = (end.outputs[place], end.features[decides], carried, own)
                done, *tell = call(output.graph, rules[i], *operands, like=end.outputs[place])
            tell = [] if i == last else tell
            specs = [*self.tail.outputs, TensorSpec(self._free("done"), "bool", (BATCH,), "done")]
            specs += [
                TensorSpec(self._free(f"told_{i}_{j}"), "float32", (), "link") for j in range(len(tell))
            ]
            made[name] = end.closed(stage, specs, [*end.outputs, done, *tell])
            self._check(made[name])
            told = self._told(made[name], len(tell))
            before = name
        return made, tuple(links)

    def _told(self, stage: Program, count: int) -> dict[TensorSpec, Tensor]:
        """The last outputs of a stage, and examples."""
        values = stage(*stage.example)
        pairs = list(zip(stage.outputs, values, strict=True))
        return dict(pairs[len(pairs) - count :])

    def _free(self, name: str) -> str:
        """A name that no stage has."""
        specs = (spec for program in self.programs.values() for spec in (*program.inputs, *program.outputs))
        return fresh(name, {spec.name for spec in (*specs, *self.tail.outputs)})

    def _check(self, stage: Program) -> None:
        """An exit gives what the model gives, in the same shapes."""
        given = {spec.name: spec for spec in stage.outputs}
        for spec in self.tail.outputs:
            if given[spec.name] != spec:
                raise PassRefused(f"an exit would give {given[spec.name]}, and the model's end gives {spec}")


def cut_stages(program: Program, after: Sequence[int]) -> Stages:
    """Cut a program after so many of its blocks each.

    Raises PassError for numbers that it has not, PassRefused where it cannot be cut.
    """
    module = open_graph(program)
    blocks = blocks_of(module.graph)
    if len(blocks) < 2:
        raise PassRefused(
            f"it has {len(blocks)} blocks that return to a residual stream, and an exit needs two"
        )
    if after[-1] >= len(blocks):
        raise PassError(
            f"exit: after={list(after)} is beyond block {len(blocks) - 1}, the last after which a row can leave early; "
            f"the model has {len(blocks)} blocks"
        )
    tail = find_tail(cut(program, module, blocks[-1].end))
    front, stages, links = program, list[Program](), list[tuple[str, ...]]()
    streams: list[str] = []
    for depth in reversed(after):
        module = open_graph(front)
        halves = cut(front, module, blocks_of(module.graph)[depth - 1].end)
        stages.insert(0, halves.second)
        links.insert(0, halves.links)
        streams.insert(0, halves.stream)
        front = halves.first
    stages.insert(0, front)
    for depth, stage, stream in zip(after, stages, streams, strict=False):
        axes = next(spec.axes for spec in stage.outputs if spec.name == stream)
        wanted = next(spec.axes for spec in tail.program.inputs if spec.name == tail.stream)
        if axes != wanted:
            raise PassRefused(
                f"the stream is {list(axes)} after block {depth} and {list(wanted)} at the model's end, which an exit "
                "has to have there too; let tokens be merged or pruned by a pass after this one"
            )
    names = [f"stage {i}" for i in range(len(stages))]
    joined = [
        Link(Port(names[i], name), Port(names[i + 1], name))
        for i, handed in enumerate(links)
        for name in handed
    ]
    depths = (*after, len(blocks))
    return Stages(dict(zip(names, stages, strict=True)), depths, tuple(joined), tuple(streams), tail)
