"""What every eviction of keys and values shares: the budget, the memory of a score, and the program ``compact``.

An eviction pass lets ``step`` remember what its score needs (a tap beside the fused attention, which stays as it
is) and adds a program ``compact``: it takes the state, chooses in every layer the slots to keep, moves them to the
front and returns the state. The runtime calls it after the prompt and then after every ``every`` tokens, and gives
back the memory. A method is a subclass with :meth:`KVEviction.score`.

Nothing depends on where a token's slot is: keys were rotated to their positions before they were cached, attention
does not mind the order of what it attends to, and slots in use are told by state. Layers of a sliding window need
the positions of what they hold, so each gets slots of its own; so does every layer when budgets differ.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokopt.analysis.cache import CachedAttention, cached_attentions, input_names
from tokopt.analysis.graph import program_module
from tokopt.bundle import Axis, AxisRange, Bundle, Program, State, TensorSpec
from tokopt.errors import PassError, PassRefused
from tokopt.kernels import ops
from tokopt.pipeline import Context, Pass, PassResult, Refusal
from tokopt.rewrite import call, export_flat, output_specs, reexport

FAR = 1e30
"""Subtracted from the score of a token that its layer's sliding window no longer reaches."""


@dataclass(frozen=True)
class Attention:
    """What one attention sees in one call of ``step``.

    ``query`` [batch, heads, tokens, channels]; ``key`` [batch, key heads, slots, channels], the new tokens
    included; ``mask`` [batch, 1 or heads, tokens, slots] bool; ``positions`` [batch, tokens] int64, -1 for
    padding; query-key products are multiplied by ``scale``.
    """

    query: Tensor
    key: Tensor
    mask: Tensor
    positions: Tensor
    scale: float

    def logits(self) -> Tensor:
        """Logits [batch, key heads, queries per key head, tokens, slots] float32, -inf where masked."""
        grouped = in_float32(self.query).unflatten(1, (self.key.shape[1], -1))
        logits = grouped @ in_float32(self.key)[:, :, None].mT * self.scale
        heads = self.mask.shape[1]
        mask = self.mask[:, :, None] if heads == 1 else self.mask.unflatten(1, (self.key.shape[1], -1))
        return logits.masked_fill(~mask, -torch.inf)

    def mass(self, logits: Tensor) -> Tensor:
        """Attention that each slot gets, summed over real queries and their heads [batch, key heads, slots, 1]."""
        real = (self.positions >= 0)[:, None, None, :, None]
        weights = torch.where(real, logits.softmax(dim=-1), 0.0)
        return weights.sum(dim=(2, 3))[..., None]


def in_float32(x: Tensor) -> Tensor:
    """``x`` in float32. A cast that does nothing would hide from the trace that the cache is written in place."""
    return x if x.dtype == torch.float32 else x.float()


@dataclass(frozen=True)
class Cached:
    """What one layer holds when slots are chosen.

    ``keys`` and ``values`` [batch, key heads, slots, channels]; ``used`` [batch, slots] bool; ``newer``
    [batch, slots] int64, how many used slots are newer: 0 for the newest.
    """

    keys: Tensor
    values: Tensor
    used: Tensor
    newer: Tensor


@dataclass(frozen=True)
class Memory:
    """A state that a method keeps per layer; the axis ``"slots"`` makes it move with the slots."""

    name: str
    dtype: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class KVEviction(Pass):
    """Base of the passes that evict keys and values.

    ``budget`` is what a layer keeps: a number of slots, a fraction of the prompt's tokens, or a list of slots,
    one per layer. ``schedule="pyramid"`` spreads it over the layers, linearly from 1.5 times in the first to 0.5
    times in the last (PyramidKV, arXiv 2406.02069). The ``sinks`` oldest and the ``recent`` newest tokens are never
    evicted. ``heads`` lets every head keep tokens of its own; without it the scores are averaged over heads.
    Slots are chosen after the prompt and then after every ``every`` tokens (0: never again), between which the
    cache holds up to ``every`` more.

    Rules. Padding is never counted or kept. Positions stay what they were: a kept token keeps its own. A budget
    of 1.0 evicts nothing and changes nothing. Every attention must read its cache directly.
    """

    budget: int | float | tuple[int, ...] = 0
    schedule: Literal["uniform", "pyramid"] = "uniform"
    sinks: int = 4
    recent: int = 32
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
    def protected(self) -> int:
        """Tokens that are kept whatever their score."""
        return self.sinks + self.recent

    def requires(self, bundle: Bundle) -> None:
        """Language models with a full cache."""
        if bundle.task != "causal-lm":
            raise PassError(f"{self.name} works on language models; this bundle is an {bundle.task}")
        if "compact" in bundle.programs:
            raise PassError(f"{self.name}: keys and values are evicted already; use one eviction pass")

    def run(self, bundle: Bundle, context: Context) -> PassResult:
        """Tap the attentions of ``step`` and add ``compact``."""
        assert bundle.generation is not None
        if self.budget == 1.0 and isinstance(self.budget, float):
            return PassResult(bundle, 0, ("a budget of 1.0 evicts nothing",))
        step = bundle.programs["step"]
        module = program_module(step)
        try:
            layers = cached_attentions(step, module.graph)
        except PassRefused as reason:
            return PassResult(bundle, 0, (), (Refusal("step", str(reason)),))
        shares = self._shares(len(layers))
        edit = _StepEdit(self, bundle, module, layers, layered=len(set(shares)) > 1)
        edited, states = edit.run()
        compact, states = _export_compact(_Compact(self, edit, shares), edited, states)
        made = replace(
            bundle,
            programs={"step": edited, "compact": compact},
            states=states,
            generation=replace(bundle.generation, compact_every=self.every),
        )
        return PassResult(made, len(layers))

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
    if not isinstance(budget, float) and smallest <= options.protected:
        raise PassError(
            f"{name} needs a budget above the {options.sinks} sinks and {options.recent} recent tokens that are "
            f"always kept, found {smallest}; for example {name}{{budget={max(2 * options.protected, 64)}}}"
        )
    if isinstance(budget, tuple) and options.schedule != "uniform":
        raise PassError(f"{name}: a list of budgets has its own schedule; leave schedule= out")


# --- step -------------------------------------------------------------------------------------------------


@dataclass
class _StepEdit:
    """The edit of ``step``: new states in, taps beside the attentions, new states out."""

    method: KVEviction
    bundle: Bundle
    module: GraphModule
    layers: list[CachedAttention]
    layered: bool
    states: dict[str, State] = field(init=False)
    inputs: list[TensorSpec] = field(init=False)
    outputs: list[TensorSpec] = field(init=False)
    example: list[Tensor] = field(init=False)
    results: list[Node] = field(init=False)

    def __post_init__(self) -> None:
        step = self.bundle.programs["step"]
        self.states = {state.name: state for state in self.bundle.states}
        self.inputs, self.outputs, self.example = list(step.inputs), list(step.outputs), list(step.example)
        results = self.module.graph.output_node().args[0]
        self.results = list(results)  # type: ignore[arg-type]
        self.nodes = {name: node for node, name in input_names(step, self.module.graph).items()}
        self.ranges = dict(step.ranges)
        self.sizes = {
            axis: size
            for spec, tensor in zip(step.inputs, step.example, strict=True)
            for axis, size in zip(spec.axes, tensor.shape, strict=True)
        }

    def run(self) -> tuple[Program, tuple[State, ...]]:
        """The edited program and its states."""
        if self.layered:
            self._split_lengths()
        for layer in self.layers:
            if self.own_slots(layer):
                self._add_slots(layer)
            self._add_memory(layer)
        self.module.graph.output_node().args = (tuple(self.results),)
        if all(self.own_slots(layer) for layer in self.layers):
            self._remove("slots")
        axes = {axis for spec in self.inputs for axis in spec.axes}
        step = self.bundle.programs["step"]
        program = replace(
            step,
            inputs=tuple(self.inputs),
            outputs=tuple(self.outputs),
            example=tuple(self.example),
            ranges={axis: bounds for axis, bounds in self.ranges.items() if axis in axes},
        )
        return reexport(program, self.module), tuple(self.states.values())

    def own_slots(self, layer: CachedAttention) -> bool:
        """Whether a layer has to know itself which slots it uses, and for which positions."""
        return self.layered or layer.window > 0

    def axis(self, layer: CachedAttention) -> str:
        """The name of the layer's slot axis."""
        return f"slots_{layer.index}" if self.layered else "slots"

    def heads(self, layer: CachedAttention) -> int:
        """Heads that choose slots of their own."""
        return layer.keys.meta["val"].shape[1] if self.method.heads else 1

    def memory(self, layer: CachedAttention) -> list[Memory]:
        """The method's memory of a layer, by the names and axes that it has in the program."""
        return [
            Memory(
                f"{m.name}_{layer.index}",
                m.dtype,
                tuple(self.axis(layer) if axis == "slots" else axis for axis in m.axes),
            )
            for m in self.method.memory(layer)
        ]

    def _split_lengths(self) -> None:
        """One length per layer, and slot axes of their own."""
        count = len(self.layers)
        place = [spec.name for spec in self.inputs].index("length")
        self.example[place] = self.example[place][:, None].repeat(1, count)
        self._respell("length", ("batch", count))
        with self.module.graph.inserting_after(self.nodes["length"]):
            lengths = call(self.module.graph, torch.unbind, self.nodes["length"], 1, like=self.layers[0].node)
        for layer in self.layers:
            with self.module.graph.inserting_after(lengths):
                length = self.module.graph.call_function(operator.getitem, (lengths, layer.index))
            self.nodes[f"length_{layer.index}"] = length
            for write in (layer.keys, layer.values):
                write.update_arg(2, length)
            for name in (f"keys_{layer.index}", f"values_{layer.index}"):
                axes = self.states[name].axes
                self._respell(name, tuple(self.axis(layer) if axis == "slots" else axis for axis in axes))
            self.ranges[self.axis(layer)] = AxisRange()
            self.sizes[self.axis(layer)] = self.sizes["slots"]

    def _add_slots(self, layer: CachedAttention) -> None:
        """Slots of the layer's own, and the mask that follows from them."""
        shared = self.example[[spec.name for spec in self.bundle.programs["step"].inputs].index("slots")]
        heads = self.heads(layer)
        state = State(
            f"slots_{layer.index}",
            "int64",
            ("batch", heads, self.axis(layer), 1),
            f"next_slots_{layer.index}",
            initial=-1,
            in_place=True,
        )
        slots = self._take(state, shared.repeat(1, heads, 1, 1))
        groups = layer.query.meta["val"].shape[1] // heads if heads > 1 else 1
        length = self.nodes.get(f"length_{layer.index}", self.nodes["length"])
        operands = (slots, self.nodes["positions"], self.nodes["mask"], length)
        graph = self.module.graph
        with graph.inserting_before(layer.node):
            pair = call(graph, _own_mask, *operands, layer.window, groups, like=layer.node)
            written, mask = (graph.call_function(operator.getitem, (pair, i)) for i in range(2))
        self._give(state, written)
        layer.node.replace_input_with(layer.mask, mask)
        self.nodes[f"mask_{layer.index}"] = mask

    def _add_memory(self, layer: CachedAttention) -> None:
        """The tap: what the method remembers of this attention."""
        memory = self.memory(layer)
        if not memory:
            return
        states = [State(m.name, m.dtype, m.axes, f"next_{m.name}") for m in memory]
        taken = [self._take(state, self._blank(state)) for state in states]
        mask = self.nodes.get(f"mask_{layer.index}", layer.mask)
        operands = (layer.query, layer.keys, mask, self.nodes["positions"], *taken)
        graph = self.module.graph
        with graph.inserting_after(layer.node):
            observed = call(graph, _tap(self.method, layer.scale), *operands, like=layer.node)
        with graph.inserting_after(observed):
            for i, state in enumerate(states):
                self._give(state, graph.call_function(operator.getitem, (observed, i)))

    def _blank(self, state: State) -> Tensor:
        """An example of a new state: small whole numbers, which any dtype holds exactly."""
        shape = [axis if isinstance(axis, int) else self.sizes[axis] for axis in state.axes]
        generator = torch.Generator().manual_seed(len(self.inputs))
        return torch.randint(0, 3, shape, generator=generator).to(getattr(torch, state.dtype))

    def _take(self, state: State, example: Tensor) -> Node:
        """A new state as an input."""
        graph = self.module.graph
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        with graph.inserting_after(last):
            node = graph.placeholder(state.name)
        node.meta["val"] = example
        self.states[state.name] = state
        self.inputs.append(TensorSpec(state.name, state.dtype, state.axes, "state"))
        self.example.append(example)
        self.nodes[state.name] = node
        return node

    def _give(self, state: State, node: Node) -> None:
        """The next value of a state as an output."""
        self.outputs.append(TensorSpec(state.output, state.dtype, state.axes, "state"))
        self.results.append(node)

    def _respell(self, name: str, axes: tuple[Axis, ...]) -> None:
        """Give a state other axes."""
        self.states[name] = replace(self.states[name], axes=axes)
        place = [spec.name for spec in self.inputs].index(name)
        self.inputs[place] = replace(self.inputs[place], axes=axes)

    def _remove(self, name: str) -> None:
        """Take a state away, and with it the nodes that only made its next value."""
        place = [spec.name for spec in self.inputs].index(name)
        out = [spec.name for spec in self.outputs].index(self.states.pop(name).output)
        del self.inputs[place], self.example[place], self.outputs[out], self.results[out]
        graph = self.module.graph
        graph.output_node().args = (tuple(self.results),)
        graph.eliminate_dead_code()
        graph.erase_node(self.nodes.pop(name))


def _tap(method: KVEviction, scale: float) -> Callable[..., tuple[Tensor, ...]]:
    """The method's observation as a function of tensors."""

    def observe(query: Tensor, key: Tensor, mask: Tensor, positions: Tensor, *memory: Tensor) -> Any:
        return method.observe(Attention(query, key, mask, positions, scale), *memory)

    return observe


def _own_mask(
    slots: Tensor, positions: Tensor, own: Tensor, length: Tensor, window: int, groups: int
) -> tuple[Tensor, Tensor]:
    """The layer's slots after the new tokens are written, and its mask [batch, 1 or heads, tokens, slots]."""
    new = positions[:, None, :, None].expand(-1, slots.shape[1], -1, -1)
    written = ops.cache_write(slots, new, length)
    mask = ops.cache_mask(written, positions, own, length, window)
    return written, mask.repeat_interleave(groups, dim=1)


# --- compact ----------------------------------------------------------------------------------------------


class _Compact(torch.nn.Module):
    """All states in, all states out: what is kept is in front, in its old order."""

    def __init__(self, method: KVEviction, edit: _StepEdit, shares: Sequence[float]) -> None:
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
        slots = old[f"slots_{layer.index}" if self.edit.own_slots(layer) else "slots"]
        length = old["length"][:, layer.index] if self.edit.layered else old["length"]
        inside = torch.arange(slots.shape[2], device=slots.device) < length[:, None]
        return inside & (slots[:, 0, :, 0] >= 0)

    def _layer(
        self, layer: CachedAttention, budget: Tensor, old: dict[str, Tensor], new: dict[str, Tensor]
    ) -> Tensor:
        """Choose and move the slots of one layer; its new length [batch]."""
        index, used = layer.index, self._used(layer, old)
        names = [memory.name for memory in self.edit.memory(layer)]
        memory = [old[name] for name in names]
        keys, values = old[f"keys_{index}"], old[f"values_{index}"]
        newer = used.sum(-1, keepdim=True) - used.long().cumsum(-1)
        score = self.method.score(Cached(keys, values, used, newer), *memory).float()
        if not self.method.heads:
            score = score.mean(dim=1, keepdim=True)
        if layer.window:
            held = old[f"slots_{index}"][..., 0]
            gone = held.amax(-1, keepdim=True) - held >= layer.window
            score = score - FAR * gone
        score = score.expand(-1, self.edit.heads(layer), -1).contiguous()
        kept = ops.keep_slots(score, used, budget, self.method.sinks, self.method.recent)
        order, count = _kept_first(kept), kept[:, 0].sum(-1)
        free = torch.arange(used.shape[1], device=used.device)[:, None] >= count[:, None, None, None]
        for name in (f"keys_{index}", f"values_{index}"):
            new[name] = _take_slots(old[name], order)
        for spec, value in zip(self.edit.memory(layer), self.method.carry(*memory), strict=True):
            moves = self.edit.axis(layer) in spec.axes
            new[spec.name] = _take_slots(value, order).masked_fill(free, 0) if moves else value
        if self.edit.own_slots(layer):
            moved = _take_slots(old[f"slots_{index}"], order)
            new[f"slots_{index}"] = moved.masked_fill(free, -1)
        elif index == min(la.index for la in self.edit.layers if not self.edit.own_slots(la)):
            new["slots"] = _take_slots(old["slots"], order[:, :1]).masked_fill(free, -1)
        return count


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
    inputs = tuple(TensorSpec(state.name, state.dtype, state.axes, "state") for state in states)
    outputs = tuple(TensorSpec(state.output, state.dtype, state.axes, "state") for state in states)
    axes = {axis for spec in inputs for axis in spec.axes if isinstance(axis, str)}
    ranges = {axis: bounds for axis, bounds in step.ranges.items() if axis in axes}
    example = _compact_example(method, states)
    exported, ranges = export_flat(module, example, inputs, ranges)
    program = Program(exported, inputs, outputs, ranges, example)
    return replace(program, outputs=output_specs(exported, program)), states


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
