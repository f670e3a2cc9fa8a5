"""A program as a row of stages, with a probe or an exit at the end of all but the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tokopt.analysis.blocks import blocks_of
from tokopt.errors import PassError, PassRefused
from tokopt.ir.bundle import fresh
from tokopt.ir.export import axis_names, placeholders, spell
from tokopt.ir.format import BATCH, Link, Port
from tokopt.ir.graph import results
from tokopt.ir.program import Program, TensorSpec
from tokopt.passes.exit.heads import Affine
from tokopt.passes.exit.rules.base import Rule, Seen
from tokopt.passes.exit.tail import Attached, Tail, attach, find_tail
from tokopt.rewrite.cut import cut
from tokopt.rewrite.edit import call, close_graph, open_graph, put_parameter


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
class Row:
    """Stages in a row, the early ones open and with the tail at their end, and the links between them."""

    early: Sequence[Attached]
    last: Program
    links: tuple[Link, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """A name for every stage, which the links have."""
        return _names(len(self.early) + 1)

    def closed(self, made: Sequence[Program]) -> Mapping[str, Program]:
        """All stages, the early ones as they were ``made``."""
        return dict(zip(self.names, (*made, self.last), strict=True))


@dataclass(frozen=True)
class Stages:
    """A program that rows may leave ``after`` so many blocks each, of ``blocks`` in all, and the tail for the exits.

    ``program`` is the model before tokens were removed, and ``reduce`` removes them: exits are put where all tokens are
    and reduced with the model, so that each reads its outputs of the tokens that are left there.
    """

    program: Program
    after: tuple[int, ...]
    blocks: int
    tail: Tail
    reduce: Callable[[Program], Program]

    @property
    def depths(self) -> tuple[int, ...]:
        """How many blocks are behind a row at the end of every stage."""
        return (*self.after, self.blocks)

    def probes(self) -> tuple[Mapping[str, Program], tuple[Link, ...]]:
        """The stages with the features of the model's own heads as outputs, and the links between them."""
        own = [one.own for one in self.tail.fitted]
        row = self.row([own] * len(self.after))
        made: list[Program] = []
        for end in row.early:
            specs = [TensorSpec(f"features {i}", "float32", (), "output") for i in range(len(end.features))]
            made.append(end.closed(specs, end.features))
        return row.closed(made), row.links

    def with_exits(
        self,
        rules: Sequence[Decide],
        heads: Sequence[Sequence[Affine]],
        fitted: Sequence[Tensor],
        decides: int,
    ) -> tuple[Mapping[str, Program], tuple[Link, ...]]:
        """The stages with exits, and the links between them, by which a rule may tell the next exit something."""
        row = self.row(heads)
        made, links = list[Program](), list(row.links)
        told: dict[TensorSpec, Tensor] = {}
        place = self.tail.fitted[decides].place
        for i, end in enumerate(row.early):
            carried = [end.take(spec, value) for spec, value in told.items()]
            links += [Link(Port(row.names[i - 1], spec.name), Port(row.names[i], spec.name)) for spec in told]
            output = end.module.graph.output_node()
            own = [put_parameter(end.module, output, None, value) for value in fitted]
            with output.graph.inserting_before(output):
                operands = (end.outputs[place], end.features[decides], carried, own)
                done, *tell = call(output.graph, rules[i], *operands, like=end.outputs[place])
            tell = [] if i + 1 == len(row.early) else tell
            specs = [*self.tail.outputs, TensorSpec(self._free(row, "done"), "bool", (BATCH,), "done")]
            specs += [
                TensorSpec(self._free(row, f"told_{i}_{j}"), "float32", (), "link") for j in range(len(tell))
            ]
            made.append(end.closed(specs, [*end.outputs, done, *tell]))
            self._check(made[-1])
            told = self._told(made[-1], len(tell))
        return row.closed(made), tuple(links)

    # --- the row --------------------------------------------------------------------------------------------

    def row(self, heads: Sequence[Sequence[Affine]]) -> Row:
        """The stages, with the tail and these heads at the end of all but the last; raises PassRefused."""
        front = self.reduce(self._with_tails(heads))
        stages, links = list[Program](), list[tuple[str, ...]]()
        for exit_, depth in reversed(list(enumerate(self.after))):
            module = open_graph(front)
            early = {name for before in range(exit_ + 1) for name in self._given(before)}
            halves = cut(front, module, blocks_of(module.graph)[depth].stream, early)
            stages.insert(0, halves.second)
            links.insert(0, halves.links)
            front = halves.first
        *early_stages, last = (front, *stages)
        names = _names(len(self.depths))
        joined = (
            Link(Port(names[i], name), Port(names[i + 1], name))
            for i, handed in enumerate(links)
            for name in handed
        )
        return Row([self._opened(i, stage) for i, stage in enumerate(early_stages)], last, tuple(joined))

    def _given(self, exit_: int) -> list[str]:
        """Names for the outputs of an exit while the model is in one piece: those of the tail's program."""
        return [f"exit {exit_} {i}" for i in range(len(self.tail.program.outputs))]

    def _with_tails(self, heads: Sequence[Sequence[Affine]]) -> Program:
        """The model in one piece, and what its exits give as further outputs."""
        module = open_graph(self.program)
        blocks = blocks_of(module.graph)
        made = results(module.graph)
        specs = list(self.program.outputs)
        for exit_, depth in enumerate(self.after):
            made += attach(module, self.program, self.tail, blocks[depth - 1].end, heads[exit_])
            specs += [TensorSpec(name, "float32", (), "output") for name in self._given(exit_)]
        module.graph.output_node().args = (tuple(made),)
        return close_graph(self.program, module, outputs=tuple(specs))

    def _opened(self, exit_: int, stage: Program) -> Attached:
        """A stage whose outputs of an exit are nodes, and no outputs yet."""
        module = open_graph(stage)
        given = dict(zip((spec.name for spec in stage.outputs), results(module.graph), strict=True))
        own = [given.pop(name) for name in self._given(exit_)]
        module.graph.output_node().args = (tuple(given.values()),)
        kept = tuple(spec for spec in stage.outputs if spec.name in given)
        count = len(self.tail.outputs)
        return Attached(replace(stage, outputs=kept), module, own[:count], own[count:])

    def _told(self, stage: Program, count: int) -> dict[TensorSpec, Tensor]:
        """The last outputs of a stage, and examples."""
        values = stage(*stage.example)
        pairs = list(zip(stage.outputs, values, strict=True))
        return dict(pairs[len(pairs) - count :])

    def _free(self, row: Row, name: str) -> str:
        """A name that no stage has."""
        programs = (*(end.stage for end in row.early), row.last)
        specs = (spec for program in programs for spec in (*program.inputs, *program.outputs))
        return fresh(name, {spec.name for spec in (*specs, *self.tail.outputs)})

    def _check(self, stage: Program) -> None:
        """An exit gives what the model gives, in the same shapes."""
        given = {spec.name: spec for spec in stage.outputs}
        for spec in self.tail.outputs:
            if given[spec.name] != spec:
                raise PassRefused(f"an exit would give {given[spec.name]}, and the model's end gives {spec}")


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"stage {i}" for i in range(count))


def _as_it_is(program: Program) -> Program:
    return program


def cut_stages(
    program: Program, after: Sequence[int], reduce: Callable[[Program], Program] = _as_it_is
) -> Stages:
    """Where a program may be cut after so many of its blocks each; ``reduce`` removes tokens of it afterwards.

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
            f"exit: after={list(after)} goes too deep: the model has {len(blocks)} blocks, so that a row can leave "
            f"early after {len(blocks) - 1} of them at most"
        )
    tail = find_tail(cut(program, module, blocks[-1].end))
    names = axis_names(placeholders(module), program.inputs)
    for depth in after:
        axes, wanted = (
            [size if isinstance(size, int) else spell(size, names) for size in end.meta["val"].shape]
            for end in (blocks[depth - 1].end, blocks[-1].end)
        )
        if axes != wanted:
            raise PassRefused(
                f"the stream is {axes} after {depth} of {len(blocks)} blocks and {wanted} at the model's end, which an "
                "exit has to have there too"
            )
    return Stages(program, tuple(after), len(blocks), tail, reduce)
