"""What every token reduction shares: the schedule, the protected prefix, and the proof of legality.

A method is a subclass with :meth:`TokenReduction.reduce`; everything else, from finding the blocks to
restoring per-token outputs, is here and in :mod:`tokopt.token_rewrite`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import ClassVar, Literal

import torch

from tokopt.analysis.blocks import Block, NoBlock, find_blocks
from tokopt.analysis.graph import ancestors, module_path, program_module, size_hint
from tokopt.analysis.token_axis import TokenTrace, prefix_tokens, trace_tokens
from tokopt.bundle import AxisRange, Bundle, Program
from tokopt.errors import PassError, UnsupportedModelError
from tokopt.kernels import ops
from tokopt.pipeline import Context, Pass, PassResult, Refusal
from tokopt.rewrite import axis_names, reexport
from tokopt.token_rewrite import Assignment, TokenRewriter, Tokens, batch_size, padding_mask

Size = int | torch.SymInt


@dataclass(frozen=True)
class TokenReduction(Pass):
    """Base of the passes that merge or prune tokens after the attention of chosen blocks.

    Exactly one schedule: ``r`` removes that many tokens in every block (one number, or a list with one per
    block); ``keep`` keeps that fraction of the unprotected tokens in every block; ``target`` removes evenly so
    that this fraction of all tokens is left at the end. ``schedule="decreasing"`` spreads a constant ``r``
    linearly from ``2r`` in the first block to 0 in the last. ``layers`` chooses blocks by index, all by default.
    ``prefix`` is the number of leading tokens that are never removed; by default the class and register tokens
    that the graph itself shows.

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

    proportional: ClassVar[bool] = False
    """Whether later attentions add ``log(size)``: true for merging."""

    def __post_init__(self) -> None:
        _check_options(self)

    def reduce(self, tokens: Tokens, r: Size, prefix: int) -> Assignment:
        """Remove ``r`` of the tokens; the first ``prefix`` stay. Plain PyTorch, traced into the graph."""
        raise NotImplementedError

    def most(self, tokens: Size, prefix: int, padded: bool) -> Size:
        """The most tokens that one block can lose."""
        return tokens - max(prefix, 1)

    def objection(self, prefix: int, dynamic: bool) -> str | None:
        """Why the method cannot work with this many protected tokens, or on a dynamic token axis; or None."""
        return None

    def requires(self, bundle: Bundle) -> None:
        """Only encoders: in a causal model the cache and the next token depend on every position."""
        if bundle.task != "encoder" or "forward" not in bundle.programs:
            raise PassError(f"{self.name} works on encoders; this bundle is a {bundle.task}")

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Reduce tokens in every block where that is provably legal; refuse the others with the reason."""
        module = program_module(bundle.forward)
        sites = find_blocks(module.graph)
        if not sites:
            raise UnsupportedModelError("the model has no attention that tokopt knows, so there are no tokens to reduce")
        refusals = [_refusal(site) for site in sites if isinstance(site, NoBlock) and site.site.kind == "self"]
        refusals += [_refusal(s) for s in sites if isinstance(s, NoBlock) and s.site.kind == "cross"]
        blocks = [site for site in sites if isinstance(site, Block)]
        chosen, impure = _pure_blocks(self._chosen(blocks), module.graph)
        plan = _Plan.make(self, chosen, len(blocks))
        plan, trace, impossible = plan.prove(module.graph)
        refusals += impure + impossible
        if plan.blocks and (objection := self.objection(plan.prefix(trace), plan.dynamic)):
            return PassResult(bundle, 0, (), (*refusals, Refusal("the model", objection)))
        if not plan.blocks:
            notes = () if refusals else ("nothing to remove",)
            return PassResult(bundle, 0, notes, tuple(refusals))
        rewriter = TokenRewriter(module, batch_size(plan.blocks[0]), self.proportional)
        rewriter.apply(plan.blocks, plan.reductions(trace), trace)
        program, floor = bundle.forward, ()
        if plan.dynamic:
            program, floor = _raise_minimum(program, plan, trace)
        restored = [program.outputs[i].name for i in rewriter.restored]
        program = reexport(program, module)
        notes = plan.notes(trace, restored) + floor
        return PassResult(bundle.with_program("forward", program), len(plan.blocks), notes, tuple(refusals))

    def _chosen(self, blocks: list[Block]) -> list[Block]:
        if self.layers is None:
            return blocks
        for layer in self.layers:
            if not -len(blocks) <= layer < len(blocks):
                raise PassError(f"layers names block {layer}, but the model has {len(blocks)} blocks that could be reduced")
        wanted = {layer % len(blocks) for layer in self.layers}
        return [block for block in blocks if block.index in wanted]


def _check_options(options: TokenReduction) -> None:
    name = options.name
    given = [n for n in ("r", "keep", "target") if getattr(options, n) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise PassError(f"{name} needs exactly one of r=, keep=, target= (found {found}); for example {name}{{r=8}}")
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


def _refusal(site: NoBlock) -> Refusal:
    return Refusal(site.site.path or "the model", site.reason)


def _pure_blocks(blocks: list[Block], graph: torch.fx.Graph) -> tuple[list[Block], list[Refusal]]:
    """Blocks whose attention tokens are the residual stream's tokens, in the same order."""
    pure: list[Block] = []
    refusals: list[Refusal] = []
    for block in blocks:
        trace = trace_tokens(graph, {block.stream: block.token_axis}, reduce=False)
        whole = all(
            (label := trace.labels.get(node)) is not None
            and len(label.axes) == 1
            and (axis := label.axes[0]).plain
            and (axis.start, axis.stop) == (0, None)
            for node in (block.site.query, block.site.key)
        )
        if whole:
            pure.append(block)
        else:
            reason = str(trace.obstacles[0]) if trace.obstacles else "the attention does not see the stream's tokens"
            refusals.append(Refusal(f"block {block.index} ({block.site.path})", reason))
    return pure, refusals


def _raise_minimum(program: Program, plan: _Plan, trace: TokenTrace) -> tuple[Program, tuple[str, ...]]:
    """The program with the smallest size of its token axis raised to what the plan needs, and a note."""
    symbol = str(plan.blocks[0].residual.meta["val"].shape[plan.blocks[0].token_axis])
    axis = axis_names(program.exported, program.inputs).get(symbol)
    if axis is None:
        raise PassError(f"the number of tokens depends on the input's size ({symbol}); capture with a fixed input size")
    known = program.ranges[axis]
    lowest = max(known.min, plan.shortest(trace))
    ranges = {**program.ranges, axis: AxisRange(lowest, known.max)}
    return replace(program, ranges=ranges), (f"inputs need {axis} >= {lowest}",)


@dataclass(frozen=True)
class _Plan:
    """Which blocks, of ``depth`` in all, lose how many tokens.

    ``removals`` is per block: a count, or a fraction to keep.
    """

    method: TokenReduction
    blocks: tuple[Block, ...]
    removals: tuple[int | Fraction, ...]
    dynamic: bool
    depth: int

    @classmethod
    def make(cls, method: TokenReduction, blocks: Sequence[Block], depth: int) -> _Plan:
        if not blocks:
            return cls(method, (), (), False, depth)
        size = blocks[0].residual.meta["val"].shape[blocks[0].token_axis]
        removals = _removals(method, len(blocks))
        if method.target is not None and not isinstance(size, int):
            raise PassError(f"{method.name}: target= needs a fixed number of tokens, and this model's is dynamic; use keep=")
        return cls(method, tuple(blocks), removals, not isinstance(size, int), depth)

    def prove(self, graph: torch.fx.Graph) -> tuple[_Plan, TokenTrace, list[Refusal]]:
        """Drop blocks until the token axis can be followed from every remaining one to the outputs."""
        plan, refusals = self._without_zeros(), []
        while True:
            trace = trace_tokens(graph, {b.residual: b.token_axis for b in plan.blocks})
            if not trace.obstacles:
                return plan._bounded(trace), trace, refusals
            obstacle = trace.obstacles[0]
            guilty = [b for b in plan.blocks if trace.labels.get(b.residual) and b.residual in ancestors(obstacle.node)]
            guilty = guilty or list(plan.blocks)
            refusals += [Refusal(f"block {b.index} ({b.site.path})", str(obstacle)) for b in guilty]
            plan = plan._keep(lambda b, gone=tuple(guilty): b not in gone)

    def _keep(self, wanted) -> _Plan:  # noqa: ANN001
        pairs = [(b, r) for b, r in zip(self.blocks, self.removals, strict=True) if wanted(b)]
        return _Plan(self.method, tuple(b for b, _ in pairs), tuple(r for _, r in pairs), self.dynamic, self.depth)

    def _without_zeros(self) -> _Plan:
        removed = dict(zip(self.blocks, self.removals, strict=True))
        return self._keep(lambda b: removed[b] != (Fraction(1) if isinstance(removed[b], Fraction) else 0))

    def prefix(self, trace: TokenTrace) -> int:
        """Protected leading tokens: what the user says, else what the graph shows."""
        found = prefix_tokens(self.blocks[0].stream) if self.blocks and self.blocks[0].token_axis == 1 else 0
        if self.method.prefix is None:
            return max(found, trace.fixed)
        if self.method.prefix < trace.fixed:
            raise PassError(
                f"prefix={self.method.prefix} leaves a token unprotected that the model reads by its slot; "
                f"use prefix={trace.fixed} or more"
            )
        return self.method.prefix

    def _bounded(self, trace: TokenTrace) -> _Plan:
        """Check that every block can spare its tokens; counts of a static axis become plain numbers."""
        if not self.blocks:
            return self
        tokens = size_hint(self._axis)
        counts = self._counts(tokens, self.prefix(trace))
        return self if self.dynamic else replace(self, removals=counts)._without_zeros()

    @property
    def _axis(self) -> Size:
        return self.blocks[0].residual.meta["val"].shape[self.blocks[0].token_axis]

    def _counts(self, tokens: int, prefix: int) -> tuple[int, ...]:
        """What each block removes from an input of this many tokens; PassError when one cannot spare it."""
        method = self.method
        removals = self.removals if method.target is None else _even(method.target, tokens, len(self.blocks))
        counts = []
        for block, wanted in zip(self.blocks, removals, strict=True):
            r = _dropped(wanted, tokens - prefix) if isinstance(wanted, Fraction) else wanted
            most = max(method.most(tokens, prefix, padding_mask(block.site.mask) is not None), 0)
            if r > most:
                raise PassError(
                    f"r={r} is too large for block {block.index} ({module_path(block.site.node)}), which has {tokens} "
                    f"tokens, {prefix} of them protected, and can lose at most {most}; remove fewer"
                )
            counts.append(r)
            tokens -= r
        return tuple(counts)

    def shortest(self, trace: TokenTrace) -> int:
        """The shortest input that this plan works on, for a dynamic axis.

        A symbolic count must also stay above 1, or ``torch.export`` would specialise on it.
        """
        prefix, longest = self.prefix(trace), size_hint(self._axis)
        least = 2 if any(isinstance(r, Fraction) for r in self.removals) else 1
        shortest = longest
        for tokens in range(longest, 1, -1):
            try:
                if min(self._counts(tokens, prefix)) < least:
                    break
            except PassError:
                break
            shortest = tokens
        return shortest

    def reductions(self, trace: TokenTrace) -> list[partial]:
        """One traced function per block."""
        prefix = self.prefix(trace)
        return [
            partial(_reduce, self.method, removal, prefix, block.index / self.depth)
            for block, removal in zip(self.blocks, self.removals, strict=True)
        ]

    def notes(self, trace: TokenTrace, restored: list[str]) -> tuple[str, ...]:
        notes = [f"{self.prefix(trace)} prefix tokens protected"]
        if restored:
            notes.append(f"restored to all tokens: {', '.join(restored)}")
        return tuple(notes)


def _reduce(
    method: TokenReduction, removal: int | Fraction, prefix: int, depth: float, tokens: Tokens
) -> Assignment:
    count = tokens.stream.shape[1]
    r = _dropped(removal, count - prefix) if isinstance(removal, Fraction) else removal
    return method.reduce(replace(tokens, depth=depth), r, prefix)


def _dropped(keep: Fraction, tokens: Size) -> Size:
    """``tokens - ceil(keep * tokens)`` in whole numbers, so that it works on symbols too."""
    return tokens - (tokens * keep.numerator + keep.denominator - 1) // keep.denominator


def _removals(method: TokenReduction, blocks: int) -> tuple[int | Fraction, ...]:
    if method.keep is not None:
        return (Fraction(method.keep).limit_denominator(10_000),) * blocks
    if method.target is not None:
        return (1,) * blocks  # fixed in _Plan._bounded, once the number of blocks is known
    if isinstance(method.r, tuple):
        if len(method.r) != blocks:
            raise PassError(f"{method.name}: r lists {len(method.r)} counts for {blocks} blocks; give one per block")
        return method.r
    assert isinstance(method.r, int)
    if method.schedule == "constant" or blocks == 1:
        return (method.r,) * blocks
    return tuple(int(2 * method.r - 2 * method.r * i / (blocks - 1) + 0.5) for i in range(blocks))


def _even(target: float | None, tokens: int, blocks: int) -> tuple[int, ...]:
    """Counts that leave ``target`` of the tokens after the last block, spread evenly, the larger ones first."""
    assert target is not None
    total = tokens - int(-(-tokens * Fraction(target).limit_denominator(10_000) // 1))
    return tuple(total // blocks + (i < total % blocks) for i in range(blocks))


def nearest(tokens: Tokens, keep: torch.Tensor, drop: torch.Tensor, prefix: int) -> torch.Tensor:
    """For pruning: the kept token whose keys are most similar stands for each removed one."""
    return ops.nearest_kept(tokens.key.mean(1), keep, drop, prefix)


def pruned(tokens: Tokens, keep: torch.Tensor, drop: torch.Tensor, prefix: int) -> Assignment:
    """The Assignment of a method that drops tokens without merging them."""
    dest = nearest(tokens, keep, drop, prefix)
    size = ops.gather_tokens(tokens.size, keep, 1)
    return Assignment(keep, drop, dest, ops.gather_tokens(tokens.stream, keep, 1), size)


__all__ = ["Assignment", "Size", "TokenReduction", "Tokens", "nearest", "pruned"]
