"""What every eviction of keys and values shares: the budget, the memory of a score, and the program ``compact``.

An eviction pass lets ``step`` remember what its score needs (a tap beside the fused attention, which stays as it
is) and adds a program ``compact``: it takes the state, chooses in every layer the slots to keep, moves them to the
front and returns the state. The runtime calls it after the prompt and then after every ``every`` tokens, and gives
back the memory. A method is a subclass with :meth:`KVEviction.score`.

Nothing depends on where a token's slot is: keys were rotated to their positions before they were cached, attention
does not mind the order of what it attends to, and slots in use are told by state. A method that renumbers positions
rotates the kept keys on by as much as their positions changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from tokopt.analysis.cache import AttentionTraits, CachedAttention, cached_attentions
from tokopt.analysis.rotary import rotaries
from tokopt.errors import PassError, PassRefused
from tokopt.ir.bundle import Bundle, fresh
from tokopt.ir.format import BATCH, Schedule, State, Trigger
from tokopt.ir.program import Program
from tokopt.kernels import ops
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal
from tokopt.rewrite.cache import (
    Attention,
    Memory,
    StepEdit,
    compactor,
    in_float32,
    language_program,
    state_program,
)
from tokopt.rewrite.edit import call, open_graph

FAR = 1e30
"""Taken from the score of a token that its layer's sliding window no longer reaches, added to that of a recent one."""

FINITE = 1e30
"""Stands for infinity in a softmax that may have nothing to compare, where infinity would give NaN."""


@dataclass(frozen=True)
class Cached:
    """What one layer holds when slots are chosen.

    ``keys`` and ``values`` [batch, key heads, slots, channels]; ``positions`` [batch, 1 or key heads, slots] int64,
    -1 in free slots and for padding; ``used`` bool, which slots hold a token, and ``newer`` int64, how many used slots
    are newer (0 for the newest), of the same shape; ``newest`` [batch] int64, the position of the newest token;
    ``layer`` has the attention's scale, and its rotary embeddings if the method ``needs_rotary``.

    Used slots are side by side, in the order of their tokens. Free slots come before them (padding, and heads that
    hold fewer tokens than others) and after them.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    used: Tensor
    newer: Tensor
    newest: Tensor
    layer: AttentionTraits

    @property
    def older(self) -> Tensor:
        """How many used slots are older [batch, 1 or key heads, slots] int64; 0 for the oldest."""
        return self.used.sum(-1, keepdim=True) - 1 - self.newer


@dataclass(frozen=True)
class KVEviction(Pass):
    """Base of the passes that evict keys and values.

    ``budget`` is what a layer keeps: a number of slots, a fraction of the prompt's tokens, or a list of slots,
    one per layer. ``schedule="pyramid"`` spreads it over the layers, linearly from 1.5 times in the first to 0.5
    times in the last (PyramidKV, arXiv 2406.02069). The ``sinks`` oldest and the ``recent`` newest tokens are never
    evicted; ``recent`` is a number of tokens, or a share of the budget. ``heads`` lets every head keep tokens of
    its own; without it the scores are averaged over heads. Slots are chosen after the prompt and then after every
    ``every`` tokens (0: never again), between which the cache holds up to ``every`` more.

    Rules. Padding is never counted or kept. Positions stay what they were: a kept token keeps its own. A budget
    of 1.0 evicts nothing and changes nothing. Every attention must read its cache directly.
    """

    budget: int | float | tuple[int, ...] = 0
    schedule: Literal["uniform", "pyramid"] = "uniform"
    sinks: int = 4
    recent: int | float = 32
    heads: bool = True
    every: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_options(self)

    def memory(self, layer: CachedAttention) -> tuple[Memory, ...]:
        """The states that the score needs; none by default."""
        return ()

    def observe(self, attention: Attention, *memory: Tensor) -> tuple[Tensor, ...]:
        """The next memory after one call of ``step``. Plain PyTorch, traced into the graph.

        Two calls have to give what one with the tokens of both gives. Padding stands in front of the tokens or behind.
        """
        return memory

    def carry(self, *memory: Tensor) -> tuple[Tensor, ...]:
        """The memory after slots were chosen, before that per slot is moved."""
        return memory

    def score(self, cached: Cached, *memory: Tensor) -> Tensor:
        """How much each slot matters [batch, key heads or 1, slots] float32, finite. Plain PyTorch, traced."""
        raise NotImplementedError

    def priority(self, cached: Cached, budget: Tensor, *memory: Tensor) -> Tensor:
        """What slots are chosen by [batch, key heads or 1, slots], with budgets [batch]: the score, guarded.

        Without ``heads`` it is the mean over heads.
        """
        score = self.score(cached, *memory).float()
        return self.guarded(score if self.heads else score.mean(dim=1, keepdim=True), cached, budget)

    def guarded(self, score: Tensor, cached: Cached, budget: Tensor) -> Tensor:
        """A score by which what a sliding window left behind comes last, and what is never evicted first."""
        if cached.layer.window:
            gone = cached.positions.amax(-1, keepdim=True) - cached.positions >= cached.layer.window
            score = score - FAR * gone
        recent: Any = self.recent
        if isinstance(recent, float):
            recent = (budget * recent).long()[:, None, None]
        return score + FAR * ((cached.older < self.sinks) | (cached.newer < recent))

    def keep(self, cached: Cached, priority: Tensor, budget: Tensor) -> Tensor:
        """The slots to keep [batch, heads, slots] bool: in every head, ``budget`` [batch] of highest priority."""
        batch, heads, _ = priority.shape
        used = cached.used.expand(-1, heads, -1).flatten(0, 1)
        budgets = budget[:, None].expand(-1, heads).flatten()
        recent = self.protected - self.sinks
        kept = ops.keep_slots(priority.flatten(0, 1)[:, None], used, budgets, self.sinks, recent)
        return kept.unflatten(0, (batch, heads))[:, :, 0]

    def merge(self, cached: Cached, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, key heads, slots, channels] with what is evicted merged into what is kept.

        ``kept`` [batch, key heads, slots] bool are the slots that stay. A row where all used slots stay must not be
        changed: its turn has not come. By default nothing is merged: what is evicted is lost.
        """
        return cached.keys, cached.values

    @property
    def needs_rotary(self) -> bool:
        """Whether the method has to know how positions rotate keys; it is refused where they do not."""
        return False

    @property
    def renumbers(self) -> bool:
        """Whether kept tokens get the positions 0, 1, 2, ... and later ones follow; keys are rotated anew."""
        return False

    @property
    def uneven(self) -> bool:
        """Whether the heads of a layer may keep different numbers of tokens; every layer then has its own length."""
        return False

    @property
    def protected(self) -> int:
        """Tokens that are kept whatever their score, beside a share of the budget."""
        return self.sinks + (self.recent if isinstance(self.recent, int) else 0)

    def requires(self, bundle: Bundle) -> None:
        """Language models with a full cache."""
        language_program(self.name, bundle)
        if compactor(bundle) is not None:
            raise PassError(f"{self.name}: keys and values are evicted already; use one eviction pass")

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Tap the attentions of the program that decodes, and add the one that compacts its cache."""
        if self.budget == 1.0 and isinstance(self.budget, float):
            return PassResult(bundle, 0, ("a budget of 1.0 evicts nothing",))
        name = language_program(self.name, bundle)
        step = bundle.programs[name]
        module = open_graph(step)
        try:
            layers = cached_attentions(step, module, bundle.states)
            self._refuse_unknown_weights(layers)
            if self.needs_rotary or self.renumbers:
                found = rotaries(step, module, layers)
                layers = [replace(layer, rotary=rotary) for layer, rotary in zip(layers, found, strict=True)]
        except PassRefused as reason:
            return PassResult(bundle, 0, (), (Refusal(name, str(reason)),))
        shares = self._shares(len(layers))
        layered = self.uneven or len(set(shares)) > 1
        if layered and self.renumbers:
            raise PassError(f"{self.name}: positions are renumbered alike in all layers; give all one budget")
        edit = StepEdit(
            bundle, name, module, self, layers, layered=layered, per_head=self.heads, shifted=self.renumbers
        )
        edited, states = edit.run()
        compact, states = _make_compact(_Compact(self, edit, shares), edited, states)
        added = fresh("compact", bundle.programs)
        made = replace(
            bundle,
            programs={**bundle.programs, name: edited, added: compact},
            states=states,
            schedule=self._schedule(bundle, added),
        )
        return PassResult(made, len(layers))

    def _refuse_unknown_weights(self, layers: Sequence[CachedAttention]) -> None:
        """Raise PassRefused where the method reads weights of attention with capped logits or sinks."""
        if others := [str(layer.layer) for layer in layers if not layer.fused and self.memory(layer)]:
            raise PassRefused(
                f"the attention of the layers {', '.join(others)} has capped logits or sinks, whose weights "
                f"{self.name} does not know; take one that scores keys or positions (knorm, keydiff, streaming, "
                "random_kv)"
            )

    def _schedule(self, bundle: Bundle, program: str) -> Schedule:
        """What drives the model now: ``program`` runs after the prompt, and then after every so many tokens."""
        assert bundle.generation is not None
        bounded = isinstance(self.budget, int) and self.budget + self.every <= bundle.generation.context
        endless = self.renumbers and bounded and self.every > 0
        triggers = [*bundle.schedule.triggers, Trigger(program, "prefill")]
        if self.every:
            triggers.append(Trigger(program, "tokens", self.every, prompt=endless))
        return replace(bundle.schedule, triggers=tuple(triggers), endless=endless)

    def _shares(self, layers: int) -> list[float]:
        """What each layer has of the budget; of a list, its largest is 1."""
        if isinstance(self.budget, tuple):
            if len(self.budget) != layers:
                raise PassError(
                    f"{self.name}: budget lists {len(self.budget)} layers, the model has {layers}"
                )
            return [one / max(self.budget) for one in self.budget]
        if self.schedule == "pyramid" and layers > 1:
            return [1.5 - layer / (layers - 1) for layer in range(layers)]
        return [1.0] * layers


def _check_options(options: KVEviction) -> None:
    name, budget = options.name, options.budget
    smallest = min(budget, default=0) if isinstance(budget, tuple) else budget
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise PassError(f"{name}: budget={budget} must be a number of slots, or a fraction in (0, 1]")
    if min(options.sinks, options.recent, options.every) < 0:
        raise PassError(f"{name}: sinks, recent and every must not be negative")
    if isinstance(options.recent, float) and options.recent >= 1:
        raise PassError(f"{name}: recent={options.recent} must be a number of tokens, or a share below 1")
    if not isinstance(budget, float) and smallest <= options.protected:
        raise PassError(
            f"{name} needs a budget above the {options.sinks} sinks and {options.protected - options.sinks} recent "
            f"tokens that are always kept, found {smallest}; for example "
            f"{name}{{budget={max(2 * options.protected, 64)}}}"
        )
    if isinstance(budget, tuple) and options.schedule != "uniform":
        raise PassError(f"{name}: a list of budgets has its own schedule; leave schedule= out")


# --- compact ----------------------------------------------------------------------------------------------


class _Compact:
    """Inserts what the program does: all states in, all states out; rows that are not due stay."""

    def __init__(self, method: KVEviction, edit: StepEdit, shares: Sequence[float]) -> None:
        self.method, self.edit, self.shares = method, edit, shares
        self.budget = edit.free("budget")
        self.names = [*edit.states, self.budget]

    def __call__(self, due: Node, *states: Node) -> list[Node]:
        insert = partial(call, due.graph, like=due)
        old = dict(zip(self.names, states, strict=True))
        new, whole = dict(old), old[self.edit.length]
        counts = list(insert(torch.unbind, whole, 1)) if self.edit.layered else [whole] * len(self.shares)
        budget = old[self.budget]
        if isinstance(self.method.budget, float):
            slots = old[self.edit.held[0].position]
            fraction, smallest = self.method.budget, self.method.protected + 1
            budget = insert(_prompt_budget, budget, counts[0], slots, fraction, smallest)
            new[self.budget] = insert(torch.where, due, budget, old[self.budget])
        lengths = [
            self._layer(place, insert, (due, budget, counts[place]), old, new) for place in range(len(counts))
        ]
        new[self.edit.length] = insert(_stacked, *lengths) if self.edit.layered else lengths[0]
        return [insert(torch.clone, new[name]) for name in self.names]

    def _layer(
        self,
        place: int,
        insert: Insert,
        given: tuple[Node, Node, Node],
        old: dict[str, Node],
        new: dict[str, Node],
    ) -> Node:
        """Move the slots of one layer; its new length."""
        due, budget, length = given
        layer, held, share = self.edit.layers[place], self.edit.held[place], self.shares[place]
        if share != 1:
            budget = insert(_share, budget, share, self.method.protected + 1)
        names = [held.key, held.value, held.position, *held.memory]
        if self.edit.shift is not None:
            names.append(self.edit.shift)
        moves = tuple(memory.moves for memory in self.method.memory(layer))
        choose = _LayerCompact(self.method, layer.traits, self.edit.heads(layer), moves)
        length, *moved = insert(choose, due, budget, length, *(old[name] for name in names))
        new.update(zip(names, moved, strict=True))
        return length


Insert = Callable[..., Any]
"""Inserts a function's call into the graph."""


@dataclass(frozen=True)
class _LayerCompact:
    """Chooses and moves the slots of one layer.

    What is kept stays in its old order. It is in front in the head that keeps most; heads that keep less begin with
    free slots, as a padded prompt does, so that new tokens follow theirs in the same slots. ``heads`` choose slots of
    their own; ``moves`` says which memories are per slot.
    """

    method: KVEviction
    traits: AttentionTraits
    heads: int
    moves: tuple[bool, ...]

    def __call__(
        self,
        due: Tensor,
        budget: Tensor,
        length: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        """The new length [batch], and the next states; ``rest`` is what is remembered, and the shift."""
        method, memory, shift = self.method, rest[: len(self.moves)], rest[len(self.moves) :]
        inside = _inside(length, slots)
        used = _used(length, slots)
        newer = used.sum(-1, keepdim=True) - used.long().cumsum(-1)
        newest = slots.flatten(1).amax(-1)
        cached = Cached(key, value, slots[..., 0], used, newer, newest, self.traits)
        priority = method.priority(cached, budget, *memory).expand(-1, self.heads, -1).contiguous()
        kept = method.keep(cached, priority, budget)
        acts = due[:, None, None]  # as logic: engines have no choice among booleans
        kept = (kept & acts) | (inside[:, None] & ~acts)
        count = kept.sum(-1, keepdim=True)
        longest = count.amax(1, keepdim=True)
        order, free = _packed(kept, longest - count), _free(kept, longest - count, longest)
        positions = _take_slots(slots, order[:, : slots.shape[1]])
        keys, values = (_take_slots(x, order) for x in method.merge(cached, kept))
        memory = tuple(
            self._carried(old, new, moves, (due, order, free))
            for old, new, moves in zip(memory, method.carry(*memory), self.moves, strict=True)
        )
        if method.renumbers:
            numbers = torch.arange(used.shape[-1], device=used.device)[None, None, :, None]
            numbers = torch.where(_by_row(due, positions), numbers.expand_as(positions), positions)
            keys = self._rotated(keys, _emptied(numbers - positions, free, 0))
            shift = (torch.where(due, shift[0] + newest + 1 - longest[:, 0, 0], shift[0]),)
            positions = numbers
        return longest[:, 0, 0], keys, values, _emptied(positions, free, -1), *memory, *shift

    def _carried(
        self, old: Tensor, new: Tensor, moves: bool, places: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """One memory of the rows that are due, moved if it is per slot."""
        due, order, free = places
        value = torch.where(_by_row(due, new), new, old)
        return _emptied(_take_slots(value, order), free, 0) if moves else value

    def _rotated(self, keys: Tensor, by: Tensor) -> Tensor:
        """Keys [batch, heads, slots, channels] moved on by positions [batch, 1 or heads, slots, 1]."""
        assert self.traits.rotary is not None
        return self.traits.rotary.rotate(in_float32(keys), by[..., 0]).to(keys.dtype)


def _prompt_budget(budget: Tensor, length: Tensor, slots: Tensor, fraction: float, smallest: int) -> Tensor:
    """Slots to keep [batch]; a fraction of the prompt becomes a number when the prompt is known."""
    used = _used(length, slots)[:, 0].sum(-1)  # of the prompt, all heads hold the same
    return torch.where(budget > 0, budget, (used * fraction).ceil().long().clamp(min=smallest))


def _share(budget: Tensor, share: float, smallest: int) -> Tensor:
    """A layer's share of the budget [batch]."""
    return (budget * share).round().long().clamp(min=smallest)


def _stacked(*lengths: Tensor) -> Tensor:
    """The lengths of all layers [batch, layers]."""
    return torch.stack(lengths, dim=1)


def _inside(length: Tensor, slots: Tensor) -> Tensor:
    """Slots before a layer's length [batch, slots]."""
    return torch.arange(slots.shape[2], device=length.device) < length[:, None]


def _used(length: Tensor, slots: Tensor) -> Tensor:
    """Slots that hold a token [batch, 1 or heads, slots]."""
    return _inside(length, slots)[:, None] & (slots[..., 0] >= 0)


def _by_row(due: Tensor, x: Tensor) -> Tensor:
    """``due`` [batch] with as many axes as ``x``."""
    return due.reshape(-1, *[1] * (x.dim() - 1))


def _packed(kept: Tensor, gap: Tensor) -> Tensor:
    """Slots [batch, heads, slots] with those kept side by side after ``gap`` [batch, heads, 1] others, in old order."""
    slots = kept.shape[-1]
    index = torch.arange(slots, device=kept.device)
    order = torch.where(kept, index, index + slots).sort(dim=-1).values
    order = torch.where(order < slots, order, order - slots)
    place = index - gap
    return order.gather(-1, torch.where(place < 0, place + slots, place))


def _free(kept: Tensor, gap: Tensor, length: Tensor) -> Tensor:
    """Slots [batch, heads, slots, 1] before ``gap`` [batch, heads, 1] and from ``length`` [batch, 1, 1] on."""
    index = torch.arange(kept.shape[-1], device=kept.device)
    return ((index < gap) | (index >= length))[..., None]


def _emptied(x: Tensor, free: Tensor, value: int) -> Tensor:
    """``x`` [batch, heads, slots, channels] with ``value`` in free slots [batch, 1 or more heads, slots, 1]."""
    return x.masked_fill(free[:, : x.shape[1]], value)


def _take_slots(x: Tensor, order: Tensor) -> Tensor:
    """``x`` [batch, heads, slots, channels] with the slots of every head in ``order`` [batch, 1 or heads, slots]."""
    batch, heads = x.shape[:2]
    index = order.expand(batch, heads, -1) if order.shape[1] != heads else order
    moved = ops.gather_tokens(x.flatten(0, 1), index.flatten(0, 1), 1)
    return moved.unflatten(0, (batch, heads))


def _make_compact(
    compact: _Compact, step: Program, states: tuple[State, ...]
) -> tuple[Program, tuple[State, ...]]:
    """The program that compacts, and the states with the budget among them."""
    method = compact.method
    amount = max(method.budget) if isinstance(method.budget, tuple) else method.budget
    amount = 0 if isinstance(amount, float) else amount  # known when the prompt is
    states = (*states, State(compact.budget, "budget", "int64", (BATCH,), initial=amount))
    return state_program(compact, states, _compact_example(method, states), step.ranges), states


def _compact_example(method: KVEviction, states: Sequence[State]) -> tuple[Tensor, ...]:
    """Two rows that hold more than the budget, the first of which began with padding; free slots at the end."""
    held = method.protected + 9
    slots, generator = held + 3, torch.Generator().manual_seed(0)
    positions = torch.full((2, 1, slots, 1), -1)
    positions[:, 0, :held, 0] = torch.arange(held) - torch.tensor([[2], [0]])
    positions.clamp_(min=-1)

    def make(state: State) -> Tensor:
        shape = [size if isinstance(size, int) else 2 if size == BATCH else slots for size in state.axes]
        if state.kind == "budget":
            return torch.full(shape, method.protected + 3)
        if state.kind == "length":
            return torch.full(shape, held)
        if state.kind == "position":
            return positions.expand(shape).clone()
        dtype: Any = getattr(torch, state.dtype)
        if not dtype.is_floating_point:
            return torch.ones(shape, dtype=dtype)
        return torch.randn(shape, generator=generator, dtype=dtype)

    return torch.ones(2, dtype=torch.bool), *(make(state) for state in states)
