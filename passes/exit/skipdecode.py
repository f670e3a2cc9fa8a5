"""SkipDecode: fewer blocks for later tokens of a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from tokopt.analysis.blocks import Block, blocks_of
from tokopt.errors import PassError
from tokopt.ir.bundle import Bundle, fresh
from tokopt.ir.format import Entry, Link, Port
from tokopt.ir.program import Program
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal
from tokopt.rewrite.bypass import Bypass
from tokopt.rewrite.cache import language_program
from tokopt.rewrite.edit import close_graph, open_graph


@dataclass(frozen=True)
class Level:
    """How many blocks compute a token once ``since`` tokens were decoded."""

    since: int
    depth: int


def levels(most: int, least: int, over: int, count: int) -> tuple[Level, ...]:
    """At most ``count`` levels on the line from ``most`` blocks at the first token to ``least`` after ``over`` tokens.

    Each begins where the line has come down to it, so that no token has fewer blocks than the line says. Of levels that
    begin with the same token the last one counts.

    >>> levels(24, 16, 64, 3)
    (Level(since=0, depth=24), Level(since=32, depth=20), Level(since=64, depth=16))
    """
    drop = most - least
    steps = min(count - 1, drop)
    depths = [most - (drop * step + steps // 2) // steps for step in range(steps + 1)] if drop else [most]
    since = {-(-over * (most - depth) // drop) if drop else 0: depth for depth in depths}
    return tuple(Level(token, depth) for token, depth in since.items())


def kept_blocks(blocks: int, depth: int, warmup: int) -> tuple[int, ...]:
    """The blocks that compute a token: the ``warmup`` lowest, and the highest that make up ``depth``.

    >>> kept_blocks(8, 5, 2)
    (0, 1, 5, 6, 7)
    """
    return (*range(warmup), *range(blocks - (depth - warmup), blocks))


@dataclass(frozen=True)
class SkipDecode(Pass):
    """Compute later tokens of a text with fewer blocks (SkipDecode, arXiv 2307.02628).

    A prompt is read by the whole model. The first token after it is computed by ``max`` blocks (all by default), one
    ``over`` tokens later by ``min``, on a line between the two in at most ``levels`` levels. The ``warmup`` lowest
    blocks always run, and of the others the highest, so that every token's blocks are among those of the tokens before
    it. All rows of a batch go on together.

    A block that is skipped still writes its keys and values, of the stream that enters the first skipped block (state
    propagation, CALM, arXiv 2207.07061): the cache holds something of every token in every layer, for a prompt that
    follows as for an eviction.

    Rules. One program reads prompts and decodes. ``max=min`` of all blocks changes nothing.
    """

    min: int
    max: int | None = None
    warmup: int = 1
    over: int = 64
    levels: int = 4

    name: ClassVar[str] = "skipdecode"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min < 1 or (self.max is not None and self.max < self.min):
            raise PassError(f"{self.name}: min={self.min} must be 1 or more, and max={self.max} no fewer")
        if not 0 <= self.warmup <= self.min:
            raise PassError(f"{self.name}: warmup={self.warmup} must be 0 to min={self.min}")
        if self.over < 1 or self.levels < 2:
            raise PassError(f"{self.name}: over={self.over} must be 1 or more, and levels={self.levels} 2")

    def requires(self, bundle: Bundle) -> None:
        """Language models in one piece."""
        language_program(self.name, bundle)

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Add a program per depth, and say in the schedule when each takes over."""
        name = language_program(self.name, bundle)
        step = bundle.programs[name]
        count = len(blocks_of(step.module.graph))
        most = count if self.max is None else self.max
        if most > count or self.min > count:
            raise PassError(f"{self.name}: max={most} and min={self.min}, but the model has {count} blocks")
        if self.min == count:
            return PassResult(bundle, 0, (f"all {count} blocks always run",))
        if any(link.source.program == name for link in bundle.links):
            reason = "it gives to other programs, which could not tell several givers apart"
            return PassResult(bundle, 0, (), (Refusal(name, reason),))
        programs, entries = dict(bundle.programs), list[Entry]()
        (decode,) = bundle.schedule.of_role("decode")
        for level in levels(most, self.min, self.over, self.levels):
            program = _shallower(step, kept_blocks(count, level.depth, self.warmup))
            if isinstance(program, Refusal):
                return PassResult(bundle, 0, (), (program,))
            added = name if level.depth == count else fresh(f"depth_{level.depth}", programs)
            programs[added] = program if level.depth < count else step
            entries.append(replace(decode, program=added, since=level.since))
        others = [entry for entry in bundle.schedule.entries if entry is not decode]
        schedule = replace(bundle.schedule, entries=(*others, *entries))
        notes = [f"{entry.program}: from token {entry.since} on" for entry in entries]
        made = replace(
            bundle, programs=programs, schedule=schedule, links=_links(bundle.links, name, entries)
        )
        return PassResult(made, len(programs) - len(bundle.programs), tuple(notes))


def _links(links: Iterable[Link], step: str, entries: Sequence[Entry]) -> tuple[Link, ...]:
    """The links, of which those that lead to the program lead to all that decode in its place as well."""
    made = list[Link]()
    for link in links:
        readers = [entry.program for entry in entries] if link.target.program == step else []
        names = dict.fromkeys((link.target.program, *readers))
        made += [replace(link, target=Port(name, link.target.name)) for name in names]
    return tuple(made)


def _shallower(step: Program, kept: tuple[int, ...]) -> Program | Refusal:
    """The program in which only the ``kept`` blocks add to the stream, or the block that cannot be skipped."""
    module = open_graph(step)
    bypass = Bypass(step, module)
    for block in _skipped(blocks_of(module.graph), kept):
        if reason := bypass.lead(block):
            return Refusal(block.label, reason)
    return close_graph(step, module)


def _skipped(blocks: list[Block], kept: tuple[int, ...]) -> Iterator[Block]:
    return (block for block in blocks if block.index not in kept)
