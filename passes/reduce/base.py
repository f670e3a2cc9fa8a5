"""What every token reduction shares: the schedule, the protected prefix, and the proof of legality.

A method is a subclass with :meth:`TokenReduction.reduce`; everything else, from finding the blocks to
restoring per-token outputs, is here and in :mod:`tokopt.rewrite.tokens`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar, Literal, TypeGuard

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from tokopt.analysis.blocks import Block, NoBlock, find_blocks
from tokopt.analysis.streams import Stream, Streams, find_streams
from tokopt.analysis.token_axis import (
    Attend,
    Restore,
    Seed,
    TokenTrace,
    met,
    prefix_tokens,
    trace_tokens,
)
from tokopt.errors import PassError, PassRefused, UnsupportedModelError
from tokopt.ir.bundle import Bundle
from tokopt.ir.export import axis_names, placeholders, spell
from tokopt.ir.graph import ancestors, common_prefix, size_hint
from tokopt.ir.program import AxisRange, Program, Reductions
from tokopt.ir.shapes import Shapes
from tokopt.kernels import declared, ops
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal
from tokopt.rewrite.edit import close_graph, open_graph
from tokopt.rewrite.tokens import Assignment, Reduction, TokenRewriter, Tokens, batch_size, padding_mask

Size = Any
"""A number of tokens: an int, or a ``torch.SymInt`` where the axis is dynamic."""


@dataclass(frozen=True)
class TokenReduction(Pass):
    """Base of the passes that merge or prune tokens after the attention of chosen blocks.

    Exactly one schedule: ``r`` removes that many tokens in every block (one number, or a list with one per
    block); ``keep`` keeps that fraction of the unprotected tokens in every block; ``target`` removes evenly so
    that this fraction of all tokens is left at the end. ``schedule="decreasing"`` spreads a constant ``r``
    linearly from ``2r`` in the first block to 0 in the last, rounded down as ToMe does. ``layers`` chooses blocks
    by index, all by default. ``prefix`` is the number of leading tokens that are never removed; by default the
    class and register tokens that the graph itself shows.

    Rules. A block is reduced only when tokopt can follow the token axis from its input to its attention and
    from there to every output; otherwise the block is refused with the op in the way. Position tables, biases
    and masks are indexed by the kept tokens. Padding (keys that no query may see) has size 0. Outputs that are
    per token get all their tokens back from the merge map. When the token axis is dynamic, its smallest size rises
    to the shortest input that every block can take ``r`` tokens from; a note says so.
    """

    r: int | tuple[int, ...] | None = None
    keep: float | None = None
    target: float | None = None
    schedule: Literal["constant", "decreasing"] = "constant"
    layers: tuple[int, ...] | None = None
    prefix: int | None = None

    merges: ClassVar[bool] = False
    """Whether removed tokens live on in others, whose sizes grow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_options(self)

    def reduce(self, tokens: Tokens, r: Size, prefix: int) -> Assignment:
        """Remove ``r`` of the tokens; the first ``prefix`` stay. Plain PyTorch, traced into the graph."""
        raise NotImplementedError

    @property
    def weighs_attention(self) -> bool:
        """Whether later attentions must add ``log(size)``; after any merge, by default."""
        return self.merges

    def kept(self, keep: Fraction, tokens: Size) -> Size:
        """How many of a block's unprotected tokens are left of ``tokens`` at ``keep``: that share, rounded up.

        In whole numbers, so that it works on symbols too.
        """
        return (tokens * keep.numerator + keep.denominator - 1) // keep.denominator

    def most(self, tokens: Size, prefix: int, padded: bool) -> Size:
        """The most tokens that one block can lose: one stays, to stand for the others."""
        return tokens - prefix - 1

    def objection(self, prefix: int, dynamic: bool) -> str | None:
        """Why the method cannot work with this many protected tokens, or on a dynamic token axis; or None."""
        return None

    def requires(self, bundle: Bundle) -> None:
        """Only encoders: in a causal model the cache and the next token depend on every position."""
        if not bundle.encoders:
            raise PassError(f"{self.name} works on encoders; this bundle is a language model")

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Reduce tokens in every block where that is provably legal; refuse the others with the reason."""
        results = [PassResult(bundle, 0)]
        for name in bundle.encoders:
            results.append(self._reduce_program(results[-1].bundle, name, context))
        return PassResult(
            results[-1].bundle,
            sum(result.matches for result in results),
            tuple(note for result in results for note in result.notes),
            tuple(refusal for result in results for refusal in result.refusals),
        )

    def _reduce_program(self, bundle: Bundle, name: str, context: Context) -> PassResult:
        return self._reduce(bundle, name, before_reductions(bundle, name, context), {})

    def _reduce(self, bundle: Bundle, name: str, done: Reductions, failed: Mapping[int, str]) -> PassResult:
        """Reduce every stream of one program, but those that have ``failed`` to be rewritten, for the reason."""
        module = open_graph(done.base)
        if reduces_tokens(module.graph):
            return PassResult(bundle, 0, (), (Refusal("the model", _REDUCED_BEFORE),))
        sites = find_blocks(module.graph)
        if not sites:
            raise UnsupportedModelError(
                "the model has no attention that tokopt knows, so there are no tokens to reduce"
            )
        blocks = [site for site in sites if isinstance(site, Block)]
        streams = find_streams(module, blocks, done.base.example)
        chosen = self.chosen(blocks, len(blocks))
        refusals = [Refusal(b.label, reason) for b, reason in streams.unfit if b in chosen]
        if self.layers is None:
            refusals += [Refusal(s.site.path or _WHOLE, s.reason) for s in sites if _is_missed(s)]
        proved, impossible = _prove(module.graph, streams, (*_reductions(done), self), failed)
        refusals += impossible
        matches = sum(one.plan.reduced_blocks(len(done.methods)) for one in proved)
        if not matches:
            notes = () if refusals else ("nothing to remove",)
            return PassResult(bundle, 0, notes, tuple(refusals))
        base, restored = done.base, list[int]()
        for one in proved:
            base = _raise_minimum(base, module, one.plan, one.trace) if one.plan.dynamic else base
        for one in proved:
            rewriter = TokenRewriter(module, batch_size(one.plan.steps[0].block))
            try:
                rewriter.apply(one.plan.reductions(one.trace), one.trace)
            except PassRefused as reason:
                return self._reduce(bundle, name, done, {**failed, one.stream: str(reason)})
            restored += rewriter.restored
        reduced = replace(close_graph(base, module), reductions=Reductions(done.base, (*done.methods, self)))
        notes = [one.note(self) for one in proved if one.plan.reduced_blocks(len(done.methods))]
        if restored:
            names = ", ".join(base.outputs[i].name for i in sorted(restored))
            notes.append(f"restored to all tokens: {names}")
        for axis, bounds in reduced.ranges.items():
            if bounds.min > done.base.ranges[axis].min:
                notes.append(f"inputs need {axis} >= {bounds.min}")
        return PassResult(bundle.with_program(name, reduced), matches, tuple(notes), tuple(refusals))

    def chosen(self, blocks: Sequence[Block], count: int) -> Sequence[Block]:
        """Those of ``blocks`` that ``layers`` names; PassError when the model, of ``count`` blocks, has no such one."""
        if self.layers is None:
            return blocks
        for layer in self.layers:
            if not -count <= layer < count:
                raise PassError(
                    f"layers names block {layer}, but the model has {count} blocks that could be reduced"
                )
        wanted = {layer % count for layer in self.layers}
        return [block for block in blocks if block.index in wanted]


@dataclass(frozen=True)
class TokenMerging(TokenReduction):
    """Base of the reductions that merge: a block can lose half of its unprotected tokens.

    ``proportional``: later attentions add ``log(size)`` to their logits, so that a token weighs as much as those that
    it stands for.
    """

    proportional: bool = True

    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.proportional, bool):
            raise PassError(f"{self.name}: proportional={self.proportional!r} must be true or false")

    @property
    def weighs_attention(self) -> bool:
        """As ``proportional`` says."""
        return self.proportional

    def most(self, tokens: Size, prefix: int, padded: bool) -> Size:
        """Half of the unprotected tokens; one less when some may be padding, so that B never is all of it."""
        return (tokens - prefix - padded) // 2


def _check_options(options: TokenReduction) -> None:
    name = options.name
    given = [n for n in ("r", "keep", "target") if getattr(options, n) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise PassError(
            f"{name} needs exactly one of r=, keep=, target= (found {found}); for example {name}{{r=8}}"
        )
    counts = options.r if isinstance(options.r, tuple) else (options.r or 0,)
    if any(not isinstance(r, int) or isinstance(r, bool) or r < 0 for r in counts):
        raise PassError(f"{name}: r={options.r!r} must be a count of tokens, or a list of them")
    for field_name in ("keep", "target"):
        value = getattr(options, field_name)
        if value is not None and not (isinstance(value, (int, float)) and 0 < value <= 1):
            raise PassError(f"{name}: {field_name}={value!r} must be a fraction in (0, 1]")
    if options.schedule not in ("constant", "decreasing"):
        raise PassError(f"{name}: schedule={options.schedule!r} must be constant or decreasing")
    if options.schedule == "decreasing" and not isinstance(options.r, int):
        raise PassError(f"{name}: schedule=decreasing spreads one number r over the blocks; give r=8, say")
    if options.prefix is not None and options.prefix < 0:
        raise PassError(f"{name}: prefix={options.prefix} must not be negative")


_REDUCED_BEFORE = (
    "its tokens were reduced before it was calibrated or saved; give all token reductions in one pipeline, ahead of "
    "the passes that calibrate"
)


def reduces_tokens(graph: Graph) -> bool:
    """Whether a graph chooses which of its tokens stay."""
    return any((op := declared(node.target)) is not None and op.choice for node in graph.nodes)


def before_reductions(bundle: Bundle, name: str, context: Context) -> Reductions:
    """A program as it would be without the token reductions made so far, and these."""
    program = bundle.programs[name]
    done = program.reductions or Reductions(program, ())
    base = done.base
    for step in done.later:
        assert isinstance(step, Pass)
        base = step.run(bundle.with_program(name, base), context).bundle.programs[name]
    return replace(done, base=base, later=())


def _reductions(done: Reductions) -> tuple[TokenReduction, ...]:
    return tuple(method for method in done.methods if isinstance(method, TokenReduction))


def _is_missed(site: Block | NoBlock) -> TypeGuard[NoBlock]:
    """Whether a user would expect a reduction here: pooling heads only read tokens."""
    return isinstance(site, NoBlock) and site.site.kind != "pooling"


@dataclass(frozen=True)
class Proved:
    """What is to be removed in one stream, by its number, and the proof that it can be; ``where`` is its module."""

    stream: int
    where: str
    plan: Plan
    trace: TokenTrace

    def meets(self, other: Proved) -> bool:
        """Whether an operator would change for both streams, in ways that do not add up."""
        ours, theirs = ({edit.node: type(edit) for edit in one.trace.edits} for one in (self, other))
        return any(
            ours[node] is not theirs[node] or ours[node] not in (Attend, Restore)
            for node in ours.keys() & theirs.keys()
        )

    def fault(self, method: TokenReduction, before: Sequence[Proved]) -> str | None:
        """Why the method cannot reduce this stream beside those ``before``."""
        other = next((other for other in before if self.meets(other)), None)
        if other is not None:
            return met(other.where)
        return method.objection(self.plan.prefix(self.trace, method), self.plan.dynamic)

    def note(self, method: TokenReduction) -> str:
        """What the method protects."""
        where = "" if self.where == _WHOLE else f" in {self.where}"
        return f"{self.plan.prefix(self.trace, method)} prefix tokens protected{where}"


_WHOLE = "the model"
"""Where the only stream of a program is."""


def _prove(
    graph: Graph, streams: Streams, methods: Sequence[TokenReduction], failed: Mapping[int, str]
) -> tuple[list[Proved], list[Refusal]]:
    """The plans of all streams that are to be reduced, and what the last of the methods cannot do.

    Where it cannot reduce a stream, the methods before it still do. Raises PassError when no stream can be reduced
    and one of them has too few tokens.
    """
    proved: list[Proved] = []
    refusals: list[Refusal] = []
    errors: list[PassError] = []
    *earlier, method = methods
    for number, stream in enumerate(streams.streams):
        where = _WHOLE if len(streams.streams) == 1 else common_prefix(b.site.path for b in stream) or _WHOLE
        others = {node: one.where for one in proved for node in one.trace.labels}
        beyond = [block.site.node for block in streams.blocks if block not in stream]
        reason = failed.get(number)
        try:
            plan, trace, impossible = Plan.make(methods, streams, stream).prove(graph, others, beyond)
            one = Proved(number, where, plan, trace)
            if reason is None and plan.reduced_blocks(len(earlier)):
                reason = one.fault(method, proved)
        except PassError as error:
            errors.append(error)
            reason = str(error)
        if reason is not None:
            plan, trace, _ = Plan.make(earlier, streams, stream).prove(graph, others, beyond)
            one, impossible = Proved(number, where, plan, trace), [Refusal(where, reason)]
        refusals += impossible
        proved += [one] if plan.steps else []
    if errors and not any(one.plan.reduced_blocks(len(earlier)) for one in proved):
        raise errors[0]
    return proved, refusals


@dataclass(frozen=True)
class Step:
    """One reduction to make, for the pass at place ``order`` among the reductions of the program.

    ``removal`` is a count, or the fraction of unprotected tokens to keep; ``padded`` says whether there can be padding.
    """

    order: int
    method: TokenReduction
    block: Block
    removal: int | Fraction
    padded: bool

    @property
    def empty(self) -> bool:
        """Whether nothing would be removed."""
        return self.removal == (1 if isinstance(self.removal, Fraction) else 0)

    def removed(self, tokens: Size) -> Size:
        """Tokens removed where ``tokens`` are unprotected."""
        if isinstance(self.removal, Fraction):
            return tokens - self.method.kept(self.removal, tokens)
        return self.removal

    def count(self, tokens: int, prefix: int) -> int:
        """Tokens removed from an input of ``tokens``; PassError when the block cannot spare them."""
        r = self.removed(tokens - prefix)
        most = max(self.method.most(tokens, prefix, self.padded), 0)
        if r > most:
            raise PassError(
                f"r={r} is too large for {self.block.label}, which has {tokens} "
                f"tokens, {prefix} of them protected, and can lose at most {most}; remove fewer"
            )
        return r


@dataclass(frozen=True)
class Plan:
    """Every reduction of one stream of a program, in block order."""

    steps: tuple[Step, ...]
    stream: Stream

    @classmethod
    def make(cls, methods: Sequence[TokenReduction], streams: Streams, stream: Stream) -> Plan:
        """The plan of several reductions applied one after the other."""
        steps = []
        for order, method in enumerate(methods):
            chosen, removals = _share(method, method.chosen(streams.blocks, streams.count), stream)
            steps += [
                Step(order, method, block, removal, padding_mask(block.site.mask) is not None)
                for block, removal in zip(chosen, removals, strict=True)
            ]
        steps.sort(key=lambda step: step.block.index)  # stable: in one block, the earlier pass goes first
        return cls(tuple(step for step in steps if not step.empty), stream)

    def reduced_blocks(self, order: int) -> int:
        """In how many blocks the pass at place ``order`` removes tokens."""
        return sum(step.order == order for step in self.steps)

    @property
    def dynamic(self) -> bool:
        """Whether the number of tokens is a symbol."""
        return bool(self.steps) and not isinstance(_tokens(self.steps[0].block), int)

    def prove(
        self, graph: Graph, others: Mapping[Node, str], beyond: Sequence[Node]
    ) -> tuple[Plan, TokenTrace, list[Refusal]]:
        """Drop blocks until the token axis can be followed from every remaining one to the outputs.

        ``others`` are the nodes that hold tokens of streams that are reduced too, and where each of these is;
        ``beyond`` the attentions of other streams' blocks.
        """
        taken = {b: where for b in self.stream for node in b.reads if (where := others.get(node)) is not None}
        gone = dict.fromkeys(step.block for step in self.steps if step.block in taken)
        refusals = [Refusal(block.label, met(taken[block])) for block in gone]
        plan = replace(self, steps=tuple(step for step in self.steps if step.block not in taken))
        while True:
            trace = trace_tokens(graph, plan.seeds(), beyond=beyond, others=others)
            if not trace.obstacles:
                return plan._checked(trace), trace, refusals
            obstacle = trace.obstacles[0]
            blocks = list(dict.fromkeys(step.block for step in plan.steps))
            guilty = [b for b in blocks if b.residual in ancestors(obstacle.node)] or blocks
            refusals += [Refusal(b.label, str(obstacle)) for b in guilty]
            plan = replace(plan, steps=tuple(s for s in plan.steps if s.block not in guilty))

    def seeds(self) -> dict[Node, Seed]:
        """Where tokens are removed, for the tracer."""
        count = Counter(step.block.residual for step in self.steps)
        return {s.block.residual: Seed(s.block.tokens_at, count[s.block.residual]) for s in self.steps}

    def prefix(self, trace: TokenTrace, method: TokenReduction) -> int:
        """Protected leading tokens: what the user says, else what the graph shows."""
        first = self.steps[0].block
        found = prefix_tokens(first.stream) if first.token_axis == 1 else 0
        if method.prefix is None:
            return max(found, trace.fixed)
        if method.prefix < trace.fixed:
            raise PassError(
                f"prefix={method.prefix} leaves a token unprotected that the model reads by its slot; "
                f"use prefix={trace.fixed} or more"
            )
        return method.prefix

    def _checked(self, trace: TokenTrace) -> Plan:
        """The plan with plain counts where the number of tokens is fixed; PassError when it cannot be met."""
        if not self.steps:
            return self
        tokens = size_hint(_tokens(self.steps[0].block))
        counts = self.counts(tokens, self.prefixes(trace))
        if self.dynamic:
            self._check_example(tokens, counts)
            return self
        steps = (replace(step, removal=r) for step, r in zip(self.steps, counts, strict=True))
        return replace(self, steps=tuple(step for step in steps if not step.empty))

    def _check_example(self, tokens: int, counts: Sequence[int]) -> None:
        """A symbolic count of one in the example would be taken for one in every input."""
        for step, count in zip(self.steps, counts, strict=True):
            if isinstance(step.removal, Fraction) and count < 2:
                raise PassError(
                    f"{step.block.label} would lose {count} of the example's {tokens} "
                    "tokens, and a share of a varying number has to remove two at least; capture with a longer example"
                )

    def prefixes(self, trace: TokenTrace) -> list[int]:
        """The protected leading tokens of every step."""
        return [self.prefix(trace, step.method) for step in self.steps]

    def counts(self, tokens: int, prefixes: Sequence[int]) -> list[int]:
        """Tokens that every step removes from an input of ``tokens``."""
        counts = []
        for step, prefix in zip(self.steps, prefixes, strict=True):
            counts.append(step.count(tokens, prefix))
            tokens -= counts[-1]
        return counts

    def shortest(self, trace: TokenTrace) -> int:
        """The shortest input that this plan works on, for a dynamic axis.

        A symbolic count must also stay above 1, or ``torch.export`` would specialise on it.
        """
        symbolic = [isinstance(step.removal, Fraction) for step in self.steps]
        prefixes = self.prefixes(trace)
        shortest = size_hint(_tokens(self.steps[0].block))
        for tokens in range(shortest, _LONGEST):
            self.counts(tokens, prefixes)  # PassError when a longer input could not spare what the plan says
        for tokens in range(shortest, 1, -1):
            try:
                counts = self.counts(tokens, prefixes)
            except PassError:
                break
            if any(r < 2 for r, is_symbol in zip(counts, symbolic, strict=True) if is_symbol):
                break
            shortest = tokens
        return shortest

    def reductions(self, trace: TokenTrace) -> list[Reduction]:
        """What to insert: one traced function per step."""
        found = []
        for step in self.steps:
            prefix, depth = self.prefix(trace, step.method), self.stream.index(step.block) / len(self.stream)
            reduce, method = partial(_reduce, step, prefix, depth), step.method
            found.append(Reduction(step.block, reduce, method.merges, method.weighs_attention))
        return found


_LONGEST = 4096
"""Up to here a plan is checked at every length; beyond, what a block can spare only grows faster."""


def _tokens(block: Block) -> Size:
    return block.residual.meta["val"].shape[block.tokens_at]


def _raise_minimum(program: Program, module: GraphModule, plan: Plan, trace: TokenTrace) -> Program:
    """The program, open as ``module``, with the smallest size of its token axis raised to what the plan needs."""
    expression = _tokens(plan.steps[0].block).node.expr
    names = axis_names(placeholders(module), program.inputs)
    varying = sorted(names[str(symbol)] for symbol in expression.free_symbols)
    if len(varying) > 1:
        raise PassError(_varies(expression, names, varying, "is of several axes"))
    (axis,) = varying
    (symbol,) = expression.free_symbols
    known, needed = program.ranges[axis], plan.shortest(trace)
    lowest = _example_size(program, axis)
    while lowest > known.min and expression.subs(symbol, lowest - 1) >= needed:
        lowest -= 1
    proved = bound_sympy(expression, {symbol: ValueRanges(lowest, known.max or int_oo)})
    if proved.lower < needed:
        raise PassError(_varies(expression, names, varying, "may fall where the axis grows"))
    bounds = AxisRange(lowest, known.max)
    Shapes.attached(module).narrow(axis, bounds)
    ranges = {**program.ranges, axis: bounds}
    return replace(program, ranges=ranges)


def _varies(expression: object, names: Mapping[str, str], axes: Sequence[str], how: str) -> str:
    """Why a number of tokens cannot vary, and what to do."""
    shown = " or ".join(map(repr, axes))
    return f"the number of tokens, {spell(expression, names)}, {how}; leave {shown} out of dynamic"


def _example_size(program: Program, axis: str) -> int:
    """How long an axis is in the example."""
    return next(
        tensor.shape[spec.axes.index(axis)]
        for spec, tensor in zip(program.inputs, program.example, strict=True)
        if axis in spec.axes
    )


def _reduce(step: Step, prefix: int, depth: float, tokens: Tokens) -> Assignment:
    r = step.removed(tokens.stream.shape[1] - prefix)
    return step.method.reduce(replace(tokens, depth=depth), r, prefix)


def _share(
    method: TokenReduction, chosen: Sequence[Block], stream: Stream
) -> tuple[Sequence[Block], Sequence[int | Fraction]]:
    """The chosen blocks of one stream and what to remove in each; a list of counts is for the blocks of all streams."""
    own = [block for block in chosen if block in stream]
    if not isinstance(method.r, tuple):
        return own, _removals(method, own)
    counts = dict(zip(chosen, _removals(method, chosen), strict=True))
    return own, [counts[block] for block in own]


def _removals(method: TokenReduction, blocks: Sequence[Block]) -> tuple[int | Fraction, ...]:
    """What the schedule removes in each of ``blocks``."""
    count = len(blocks)
    if not count:
        return ()
    if method.keep is not None:
        return (Fraction(method.keep).limit_denominator(10_000),) * count
    if method.target is not None:
        return _even(method, _tokens(blocks[0]), count)
    if isinstance(method.r, tuple):
        if len(method.r) != count:
            raise PassError(
                f"{method.name}: r lists {len(method.r)} counts for {count} blocks; give one per block"
            )
        return method.r
    assert isinstance(method.r, int)
    if method.schedule == "constant" or count == 1:
        return (method.r,) * count
    last = count - 1
    return tuple(2 * method.r * (last - i) // last for i in range(count))


def _even(method: TokenReduction, tokens: Size, blocks: int) -> tuple[int, ...]:
    """Counts that leave ``target`` of the tokens after the last block, spread evenly, the larger ones first."""
    if not isinstance(tokens, int):
        raise PassError(
            f"{method.name}: target= needs a fixed number of tokens, and this model's is dynamic; use keep="
        )
    assert method.target is not None
    total = tokens - math.ceil(tokens * Fraction(method.target).limit_denominator(10_000))
    return tuple(total // blocks + (i < total % blocks) for i in range(blocks))


def nearest(tokens: Tokens, keep: torch.Tensor, drop: torch.Tensor, prefix: int) -> torch.Tensor:
    """For pruning: the kept token whose keys are most similar stands for each removed one."""
    return ops.nearest_kept(tokens.key.mean(1), keep, drop, prefix)


def pruned(tokens: Tokens, keep: torch.Tensor, drop: torch.Tensor, prefix: int) -> Assignment:
    """The Assignment of a method that drops tokens without merging them."""
    dest = nearest(tokens, keep, drop, prefix)
    size = ops.gather_tokens(tokens.size, keep, 1)
    return Assignment(keep, drop, dest, ops.gather_tokens(tokens.stream, keep, 1), size)


__all__ = ["Assignment", "Size", "TokenMerging", "TokenReduction", "Tokens", "nearest", "pruned"]
