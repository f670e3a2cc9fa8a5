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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokopt.analysis.cache import CachedAttention, cached_attentions
from tokopt.analysis.rotary import rotaries
from tokopt.errors import PassError, PassRefused
from tokopt.ir.bundle import Bundle, State
from tokopt.ir.program import Program
from tokopt.kernels import ops
from tokopt.pipeline.base import Context, Pass, PassResult, Refusal
from tokopt.rewrite.cache import (
    Attention,
    Memory,
    StepEdit,
    in_float32,
    require_language_model,
    state_program,
)
from tokopt.rewrite.edit import open_graph

if TYPE_CHECKING:
    from tokopt.ir.bundle import Generation

FAR = 1e30
"""Taken from the score of a token that its layer's sliding window no longer reaches, added to that of a recent one."""


@dataclass(frozen=True)
class Cached:
    """What one layer holds when slots are chosen.

    ``keys`` and ``values`` [batch, key heads, slots, channels]; ``used`` [batch, slots] bool; ``newer``
    [batch, slots] int64, how many used slots are newer: 0 for the newest; ``newest`` [batch] int64, the position of
    the newest token; ``layer`` has the attention's scale, and its rotary embeddings if the method ``needs_rotary``.
    """

    keys: Tensor
    values: Tensor
    used: Tensor
    newer: Tensor
    newest: Tensor
    layer: CachedAttention


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
        """The next memory after one call of ``step``. Plain PyTorch, traced into the graph."""
        return memory

    def carry(self, *memory: Tensor) -> tuple[Tensor, ...]:
        """The memory after slots were chosen, before that per slot is moved."""
        return memory

    def score(self, cached: Cached, *memory: Tensor) -> Tensor:
        """How much each slot matters [batch, key heads or 1, slots] float32, finite. Plain PyTorch, traced."""
        raise NotImplementedError

    @property
    def needs_rotary(self) -> bool:
        """Whether the method has to know how positions rotate keys; it is refused where they do not."""
        return False

    @property
    def renumbers(self) -> bool:
        """Whether kept tokens get the positions 0, 1, 2, ... and later ones follow; keys are rotated anew."""
        return False

    @property
    def protected(self) -> int:
        """Tokens that are kept whatever their score, beside a share of the budget."""
        return self.sinks + (self.recent if isinstance(self.recent, int) else 0)

    def requires(self, bundle: Bundle) -> None:
        """Language models with a full cache."""
        require_language_model(self.name, bundle)
        if "compact" in bundle.programs:
            raise PassError(f"{self.name}: keys and values are evicted already; use one eviction pass")

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Tap the attentions of ``step`` and add ``compact``."""
        assert bundle.generation is not None
        if self.budget == 1.0 and isinstance(self.budget, float):
            return PassResult(bundle, 0, ("a budget of 1.0 evicts nothing",))
        step = bundle.programs["step"]
        module = open_graph(step)
        try:
            layers = cached_attentions(step, module.graph)
            if self.needs_rotary or self.renumbers:
                found = rotaries(step, module, layers)
                layers = [replace(layer, rotary=rotary) for layer, rotary in zip(layers, found, strict=True)]
        except PassRefused as reason:
            return PassResult(bundle, 0, (), (Refusal("step", str(reason)),))
        shares = self._shares(len(layers))
        layered = len(set(shares)) > 1
        if layered and self.renumbers:
            raise PassError(f"{self.name}: positions are renumbered alike in all layers; give all one budget")
        edit = StepEdit(
            bundle, module, self, layers, layered=layered, per_head=self.heads, shifted=self.renumbers
        )
        edited, states = edit.run()
        compact, states = _export_compact(_Compact(self, edit, shares), edited, states)
        made = replace(
            bundle,
            programs={"step": edited, "compact": compact},
            states=states,
            generation=self._generation(bundle.generation),
        )
        return PassResult(made, len(layers))

    def _generation(self, settings: Generation) -> Generation:
        """How the runtime drives the model now."""
        bounded = isinstance(self.budget, int) and self.budget + self.every <= settings.context
        endless = self.renumbers and bounded and self.every > 0
        return replace(settings, compact_every=self.every, endless=endless)

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


class _Compact(torch.nn.Module):
    """All states in, all states out: what is kept is in front, in its old order."""

    def __init__(self, method: KVEviction, edit: StepEdit, shares: Sequence[float]) -> None:
        super().__init__()
        self.method, self.edit, self.shares = method, edit, shares

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        names = [*self.edit.states, "budget"]
        old = dict(zip(names, tensors, strict=True))
        new = dict(old)
        new["budget"] = budget = self._budget(old)
        lengths = []
        for layer, share in zip(self.edit.layers, self.shares, strict=True):
            own = (
                budget if share == 1 else (budget * share).round().long().clamp(min=self.method.protected + 1)
            )
            lengths.append(self._layer(layer, own, old, new))
        new["length"] = torch.stack(lengths, dim=1) if self.edit.layered else lengths[0]
        return tuple(new[name].clone() for name in names)

    def _budget(self, old: dict[str, Tensor]) -> Tensor:
        """Slots to keep [batch]; a fraction of the prompt becomes a number when the prompt is known."""
        if not isinstance(self.method.budget, float):
            return old["budget"]
        used = self._used(self.edit.layers[0], old).sum(-1)
        fraction = (used * self.method.budget).ceil().long().clamp(min=self.method.protected + 1)
        return torch.where(old["budget"] > 0, old["budget"], fraction)

    def _used(self, layer: CachedAttention, old: dict[str, Tensor]) -> Tensor:
        """Slots that hold a token [batch, slots]."""
        slots = self._slots(layer, old)
        length = old["length"][:, layer.index] if self.edit.layered else old["length"]
        inside = torch.arange(slots.shape[2], device=slots.device) < length[:, None]
        return inside & (slots[:, 0, :, 0] >= 0)

    def _slots(self, layer: CachedAttention, old: dict[str, Tensor]) -> Tensor:
        """Position of the token in each slot [batch, 1 or heads, slots, 1]."""
        return old[f"slots_{layer.index}" if self.edit.own_slots(layer) else "slots"]

    def _layer(
        self, layer: CachedAttention, budget: Tensor, old: dict[str, Tensor], new: dict[str, Tensor]
    ) -> Tensor:
        """Choose and move the slots of one layer; its new length [batch]."""
        index, used = layer.index, self._used(layer, old)
        names = [memory.name for memory in self.edit.memory(layer)]
        memory = [old[name] for name in names]
        keys, values = old[f"keys_{index}"], old[f"values_{index}"]
        newer = used.sum(-1, keepdim=True) - used.long().cumsum(-1)
        newest = self._slots(layer, old)[:, 0, :, 0].amax(-1)
        cached = Cached(keys, values, used, newer, newest, layer)
        score = self.method.score(cached, *memory).float()
        if not self.method.heads:
            score = score.mean(dim=1, keepdim=True)
        if layer.window:
            positions = old[f"slots_{index}"][..., 0]
            gone = positions.amax(-1, keepdim=True) - positions >= layer.window
            score = score - FAR * gone
        recent = self.method.recent
        if isinstance(recent, float):
            score = score + FAR * (newer < (budget * recent).long()[:, None])[:, None]
            recent = 0
        score = score.expand(-1, self.edit.heads(layer), -1).contiguous()
        kept = ops.keep_slots(score, used, budget, self.method.sinks, recent)
        order, count = _kept_first(kept), kept[:, 0].sum(-1)
        slots = self._slots(layer, old)
        held = _take_slots(slots, order[:, : slots.shape[1]])
        free = torch.arange(used.shape[1], device=used.device)[:, None] >= count[:, None, None, None]
        for name in (f"keys_{index}", f"values_{index}"):
            new[name] = _take_slots(old[name], order)
        for spec, value in zip(self.edit.memory(layer), self.method.carry(*memory), strict=True):
            moves = self.edit.axis(layer) in spec.axes
            new[spec.name] = _take_slots(value, order).masked_fill(free, 0) if moves else value
        if self.method.renumbers:
            numbers = torch.arange(used.shape[1], device=used.device)[None, None, :, None].expand_as(held)
            new[f"keys_{index}"] = _rotated(
                layer, new[f"keys_{index}"], (numbers - held).masked_fill(free, 0)
            )
            new["shift"] = old["shift"] + newest + 1 - count
            held = numbers
        new[f"slots_{index}" if self.edit.own_slots(layer) else "slots"] = held.masked_fill(free, -1)
        return count


def _rotated(layer: CachedAttention, keys: Tensor, by: Tensor) -> Tensor:
    """Keys [batch, heads, slots, channels] moved on by positions [batch, 1 or heads, slots, 1]."""
    assert layer.rotary is not None
    return layer.rotary.rotate(in_float32(keys), by[..., 0]).to(keys.dtype)


def _kept_first(kept: Tensor) -> Tensor:
    """Slots [batch, heads, slots] with those kept in front, both parts in their old order."""
    slots = kept.shape[-1]
    index = torch.arange(slots, device=kept.device)
    order = torch.where(kept, index, index + slots).sort(dim=-1).values
    return torch.where(order < slots, order, order - slots)


def _take_slots(x: Tensor, order: Tensor) -> Tensor:
    """``x`` [batch, heads, slots, channels] with the slots of every head in ``order`` [batch, 1 or heads, slots]."""
    batch, heads = x.shape[:2]
    index = order.expand(batch, heads, -1) if order.shape[1] != heads else order
    moved = ops.gather_tokens(x.flatten(0, 1), index.flatten(0, 1), 1)
    return moved.unflatten(0, (batch, heads))


def _export_compact(
    module: _Compact, step: Program, states: tuple[State, ...]
) -> tuple[Program, tuple[State, ...]]:
    """The program ``compact`` and the states, with the budget among them."""
    method = module.method
    amount = max(method.budget) if isinstance(method.budget, tuple) else method.budget
    amount = 0 if isinstance(amount, float) else amount  # known when the prompt is
    states = (*states, State("budget", "int64", ("batch",), "next_budget", initial=amount))
    example = _compact_example(method, states)
    return state_program(module, states, example, step.ranges), states


def _compact_example(method: KVEviction, states: Sequence[State]) -> tuple[Tensor, ...]:
    """Two rows that hold more than the budget, the first of which began with padding; free slots at the end."""
    held = method.protected + 9
    slots, generator = held + 3, torch.Generator().manual_seed(0)
    positions = torch.full((2, 1, slots, 1), -1)
    positions[:, 0, :held, 0] = torch.arange(held) - torch.tensor([[2], [0]])
    positions.clamp_(min=-1)

    def make(state: State) -> Tensor:
        shape = [size if isinstance(size, int) else 2 if size == "batch" else slots for size in state.axes]
        if state.name == "budget":
            return torch.full(shape, method.protected + 3)
        if state.name == "length":
            return torch.full(shape, held)
        if state.name.startswith("slots"):
            return positions.expand(shape).clone()
        dtype: Any = getattr(torch, state.dtype)
        if not dtype.is_floating_point:
            return torch.ones(shape, dtype=dtype)
        return torch.randn(shape, generator=generator, dtype=dtype)

    return tuple(make(state) for state in states)
