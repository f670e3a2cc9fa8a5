"""Cut a model at a block into two programs that run one after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from tokopt.analysis.blocks import blocks_of
from tokopt.errors import PassError, PassRefused
from tokopt.ir.bundle import Bundle, Semantics, fresh
from tokopt.ir.format import Entry, Schedule
from tokopt.ir.graph import results
from tokopt.ir.program import Program
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal
from tokopt.rewrite.cut import Halves, cut
from tokopt.rewrite.edit import open_graph


@dataclass(frozen=True)
class Split(Pass):
    """Cut the model where block ``at`` reads the residual stream: blocks before it run in a program of their own.

    The two programs in a row give what the one gave, bit for bit. Parameters are stored once. The stream goes over a
    link; masks, rotary tables and sizes are computed again from the inputs. A state stays with the layer that reads and
    writes it. ``at`` counts blocks from 0, over all programs where the model was cut before; as many as there are cuts
    behind the last one.
    """

    at: int

    name: ClassVar[str] = "split"
    semantics: ClassVar[Semantics] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at < 1:
            raise PassError(f"{self.name}: at={self.at} leaves nothing before the cut; give 1 or more")

    def requires(self, bundle: Bundle) -> None:
        """Models from which no row leaves early."""
        if any(spec.role == "done" for name in bundle.encoders for spec in bundle.programs[name].outputs):
            raise PassError(f"{self.name}: rows leave early; put it before the pass that lets them")

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Replace the program that holds the block by two."""
        name, block = self._place(bundle)
        program = bundle.programs[name]
        module = open_graph(program)
        blocks = blocks_of(module.graph)
        if not block:
            return PassResult(bundle, 0, (f"the model is cut at block {self.at} already",))
        at = blocks[block].stream if block < len(blocks) else blocks[-1].end
        if at in results(module.graph) and len(results(module.graph)) == 1:
            return PassResult(bundle, 0, (), (Refusal(name, "nothing is computed after the last block"),))
        try:
            halves = cut(program, module, at)
        except PassRefused as reason:
            return PassResult(bundle, 0, (), (Refusal(name, str(reason)),))
        return PassResult(_replaced(bundle, name, halves), 1)

    def _place(self, bundle: Bundle) -> tuple[str, int]:
        """The program to cut, and the block of it; raises PassError where the model has no such block."""
        names = model_programs(bundle)
        counts = [len(blocks_of(bundle.programs[name].module.graph)) for name in names]
        total = sum(counts)
        if not total:
            raise PassError(f"{self.name}: the model has no blocks of self-attention to cut between")
        if self.at > total:
            raise PassError(f"{self.name}: at={self.at}, but the model has {total} blocks")
        at = self.at
        for name, count in zip(names, counts, strict=True):
            last = name == names[-1]
            if at < count or (last and at == count):
                return name, at
            at -= count
        raise AssertionError("a block is in some program")


def model_programs(bundle: Bundle) -> tuple[str, ...]:
    """The programs that compute a model's blocks, in order; of one that writes texts, those of a call."""
    decode = bundle.schedule.entry("decode")
    return decode.programs if decode is not None else bundle.encoders


def _replaced(bundle: Bundle, name: str, halves: Halves) -> Bundle:
    """The bundle with two programs in place of one."""
    first = fresh("first", bundle.programs)
    second = fresh("second", (*bundle.programs, first))
    programs: dict[str, Program] = {}
    for other, program in bundle.programs.items():
        programs |= {first: halves.first, second: halves.second} if other == name else {other: program}
    when = "call" if bundle.schedule.generates else "once"
    return replace(
        bundle,
        programs=programs,
        links=halves.links_of(bundle.links, name, first, second, when),
        schedule=_scheduled(bundle.schedule, name, (first, second)),
    )


def _scheduled(schedule: Schedule, name: str, halves: tuple[str, str]) -> Schedule:
    """Both halves wherever the whole ran."""
    entries: list[Entry] = []
    for entry in schedule.entries:
        if name not in entry.programs:
            entries.append(entry)
        elif entry.role == "encode":
            entries += [replace(entry, program=halves[0]), replace(entry, program=halves[1], slots=0)]
        else:
            place = entry.programs.index(name)
            program, *then = (*entry.programs[:place], *halves, *entry.programs[place + 1 :])
            entries.append(replace(entry, program=program, then=tuple(then)))
    return replace(schedule, entries=tuple(entries))
