"""Give the step of a language model further state: what its attentions see, per layer and slot.

Attention itself stays the one fused op it is; a tap reads its operands beside it. Layers of a sliding window need
the positions of what they hold, so each gets slots of its own; so does every layer when lengths differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokopt.analysis.cache import AttentionTraits, CachedAttention, input_of_role
from tokopt.analysis.rotation import Rotary
from tokopt.errors import PassError
from tokopt.ir.bundle import Bundle, fresh
from tokopt.ir.export import placeholders
from tokopt.ir.format import BATCH, Occupancy, State, slot_axis
from tokopt.ir.graph import ancestors, aten, drop_dead, is_call, reaches, results, same_size
from tokopt.ir.program import Axis, AxisRange, Program, TensorSpec
from tokopt.ir.shapes import Shapes
from tokopt.kernels import ops
from tokopt.rewrite.edit import after, call, close_graph, new_graph, put_parameter, redirect


@dataclass(frozen=True)
class Attention:
    """What one attention sees in one call of ``step``.

    ``query`` [batch, heads, tokens, channels]; ``key`` [batch, key heads, slots, channels], the new tokens
    included; ``mask`` [batch, 1 or heads, tokens, slots] bool; ``positions`` [batch, tokens] int64, -1 for
    padding; query-key products are multiplied by ``scale``; ``rotary`` is how positions rotate queries and keys,
    where the method asked for it.
    """

    query: Tensor
    key: Tensor
    mask: Tensor
    positions: Tensor
    scale: float
    rotary: Rotary | None = None

    def logits(self) -> Tensor:
        """Logits [batch, key heads, queries per key head, tokens, slots] float32, -inf where masked."""
        grouped = in_float32(self.query).unflatten(1, (self.key.shape[1], -1))
        logits = grouped @ in_float32(self.key)[:, :, None].mT * self.scale
        heads = self.mask.shape[1]
        mask = self.mask[:, :, None] if heads == 1 else self.mask.unflatten(1, (self.key.shape[1], -1))
        return logits.masked_fill(~mask, -torch.inf)

    def mass(self) -> Tensor:
        """Attention that each slot gets, summed over real queries and their heads [batch, key heads, slots, 1]."""
        return ops.attention_mass(self.query, self.key, self.mask, self.positions, self.scale)


def language_program(name: str, bundle: Bundle) -> str:
    """The program that reads prompts and decodes, for the pass of this name.

    Raises PassError where there is none, or where they are two.
    """
    entries = [entry for role in ("prefill", "decode") for entry in bundle.schedule.of_role(role)]
    if not entries:
        raise PassError(f"{name} works on language models; this bundle is an encoder")
    if any(entry.then for entry in entries):
        raise PassError(f"{name} works on a model in one piece; put it before split")
    if bundle.schedule.commit is not None:
        raise PassError(f"{name} does not know how trees of tokens are taken back; put it before verify")
    names = [entry.program for entry in entries]
    if len(set(names)) > 1:
        raise PassError(
            f"{name} works where one program reads prompts and decodes; here they are two: put it before speculate or "
            "skipdecode if one of these made them so"
        )
    return names[0]


def compactor(bundle: Bundle) -> str | None:
    """The program that moves keys and values between calls; None where nothing is evicted."""
    cached = {state.name for state in bundle.states if state.kind in ("key", "value")}
    for trigger in bundle.schedule.triggers:
        if cached & {spec.state for spec in bundle.programs[trigger.program].outputs}:
            return trigger.program
    return None


def in_float32(x: Tensor) -> Tensor:
    """``x`` in float32. A cast that does nothing would hide from the trace that the cache is written in place."""
    return x if x.dtype == torch.float32 else x.float()


SLOTS = "slots"
"""In the axes of a :class:`Memory`: the slots of its layer, whatever their axis is called."""


@dataclass(frozen=True)
class Memory:
    """A state that a method keeps per layer; with the axis :data:`SLOTS` it moves with the slots."""

    name: str
    dtype: str
    axes: tuple[Axis, ...]

    @property
    def moves(self) -> bool:
        """Whether there is an entry per slot."""
        return SLOTS in self.axes


class Tap(Protocol):
    """What reads beside an attention, and the memory that it keeps."""

    def memory(self, layer: CachedAttention) -> tuple[Memory, ...]:
        """The states of one layer."""
        ...

    def observe(self, attention: Attention, *memory: Tensor) -> tuple[Tensor, ...]:
        """The next memory after one call of ``step``. Plain PyTorch, traced into the graph.

        Two calls have to give what one with the tokens of both gives. Padding stands in front of the tokens or behind.
        """
        ...


@dataclass
class ProgramEdit:
    """An edit of a program that takes states away, changes them or adds some.

    ``states`` are the bundle's by name, ``nodes`` the inputs of ``module`` that read them.
    """

    bundle: Bundle
    name: str
    module: GraphModule
    states: dict[str, State] = field(init=False)
    inputs: list[TensorSpec] = field(init=False)
    outputs: list[TensorSpec] = field(init=False)
    example: list[Tensor] = field(init=False)
    results: list[Node] = field(init=False)
    aliases: dict[str, str] = field(init=False)
    nodes: dict[str, Node] = field(init=False)

    def __post_init__(self) -> None:
        program = self.program
        self.states = {state.name: state for state in self.bundle.states}
        self.inputs, self.outputs = list(program.inputs), list(program.outputs)
        self.example, self.aliases = list(program.example), dict(program.aliases)
        self.results = results(self.module.graph)
        inputs = zip(program.inputs, placeholders(self.module), strict=True)
        self.nodes = {spec.state: node for spec, node in inputs if spec.state is not None}
        self.ranges = dict(program.ranges)

    @property
    def program(self) -> Program:
        """The program as it was."""
        return self.bundle.programs[self.name]

    def of_role(self, role: str) -> Node:
        """The input of a role that the program has once."""
        return input_of_role(self.program, self.module, role)

    def finish(self) -> Program:
        """The edited program."""
        self.module.graph.output_node().args = (tuple(self.results),)
        axes = {axis for spec in self.inputs for axis in spec.axes}
        program = replace(
            self.program,
            ranges={axis: bounds for axis, bounds in self.ranges.items() if axis in axes},
        )
        return close_graph(
            program,
            self.module,
            inputs=tuple(self.inputs),
            outputs=tuple(self.outputs),
            example=tuple(self.example),
            aliases=self.aliases,
        )

    def take(self, state: State, example: Tensor) -> Node:
        """A new state as an input."""
        self.states[state.name] = state
        spec = TensorSpec(state.name, state.dtype, state.axes, "state", state.name)
        self.nodes[state.name] = self.add_input(spec, example)
        return self.nodes[state.name]

    def add_input(self, spec: TensorSpec, example: Tensor) -> Node:
        """A new input, after those that there are."""
        graph = self.module.graph
        with graph.inserting_after(placeholders(self.module)[-1]):
            node = graph.placeholder(spec.name)
        self.inputs.append(spec)
        node.meta["val"] = self._blank_value(spec, example)
        self.example.append(example)
        return node

    def fix_input(self, role: str, value: Tensor) -> None:
        """Let an input be a constant."""
        node = self.of_role(role)
        place = next(i for i, spec in enumerate(self.inputs) if spec.role == role)
        first = next(node for node in self.module.graph.nodes if node.op != "placeholder")
        constant = put_parameter(self.module, first, None, value)
        node.replace_all_uses_with(constant)
        self.module.graph.erase_node(node)
        del self.inputs[place], self.example[place]

    def give(self, state: State, node: Node, *, written: bool = False) -> None:
        """The next value of a state as an output; ``written``: it is the state with new entries written into it."""
        name = fresh(f"next_{state.name}", [spec.name for spec in self.outputs])
        self.outputs.append(TensorSpec(name, state.dtype, state.axes, "state", state.name))
        self.results.append(node)
        if written:
            self.aliases[name] = self.inputs[self._place(state.name)].name

    def remove(self, name: str) -> None:
        """Take a state away, and with it the nodes that only made its next value."""
        place, out = self._place(name), self._out(name)
        self.aliases.pop(self.outputs[out].name, None)
        del self.states[name], self.inputs[place], self.example[place], self.outputs[out], self.results[out]
        graph = self.module.graph
        graph.output_node().args = (tuple(self.results),)
        drop_dead(graph)
        graph.erase_node(self.nodes.pop(name))

    def respell(self, name: str, example: Tensor, **changes: Any) -> None:
        """Give a state another dtype, axes or occupancy, and an example that has them."""
        self.states[name] = replace(self.states[name], **changes)
        spelled = {key: value for key, value in changes.items() if key in ("dtype", "axes")}
        place, out = self._place(name), self._out(name)
        self.inputs[place] = replace(self.inputs[place], **spelled)
        self.outputs[out] = replace(self.outputs[out], **spelled)
        self.example[place] = example
        self.nodes[name].meta["val"] = self._blank_value(self.inputs[place], example)

    def sample(self, name: str) -> Tensor:
        """The example of a state."""
        return self.example[self._place(name)]

    def free(self, name: str) -> str:
        """``name``, or one like it, that no state and no input has."""
        return fresh(name, [*self.states, *(spec.name for spec in self.inputs)])

    def _place(self, name: str) -> int:
        return [spec.state for spec in self.inputs].index(name)

    def _out(self, name: str) -> int:
        return [spec.state for spec in self.outputs].index(name)

    def _blank_value(self, spec: TensorSpec, example: Tensor) -> Tensor:
        shapes = Shapes.attached(self.module)
        shapes.name(spec, example, self.ranges)
        for axis in spec.axes:
            if isinstance(axis, str):
                self.ranges.setdefault(axis, AxisRange())
        return shapes.blank(spec)


@dataclass(frozen=True)
class LayerStates:
    """The names of the states of one layer: its cache, its slots' positions, and what a method remembers of it."""

    key: str
    value: str
    position: str
    memory: tuple[str, ...]


@dataclass
class StepEdit(ProgramEdit):
    """The edit of an eviction: new states in, a tap beside every attention, new states out.

    ``layered`` gives every layer a length and a slot axis of its own; ``per_head`` lets every key head hold
    tokens of its own; ``shifted`` counts positions from a state that grows as slots are renumbered. ``held`` are the
    states of every layer, and ``shift`` is the name of that state, once the edit has run.
    """

    tap: Tap
    layers: list[CachedAttention]
    layered: bool
    per_head: bool
    shifted: bool
    held: list[LayerStates] = field(init=False, default_factory=list)
    shift: str | None = field(init=False, default=None)

    def run(self) -> tuple[Program, tuple[State, ...]]:
        """The edited program and the bundle's states."""
        self.length = self._length_state()
        self.shared = self._position_state()
        self.positions = self.of_role("positions")
        self.lengths = [self.nodes[self.length]] * len(self.layers)
        if self.shifted:
            self._shift_positions()
        if self.layered:
            self._split_lengths()
        for place, layer in enumerate(self.layers):
            position, mask = self.shared, layer.hiding.mask
            if self.own_slots(layer):
                position, mask = self._add_slots(place, layer)
            memory = self._add_memory(layer, mask)
            self.held.append(LayerStates(layer.key_state, layer.value_state, position, memory))
        if all(self.own_slots(layer) for layer in self.layers):
            self.remove(self.shared)
        return self.finish(), tuple(self.states.values())

    def own_slots(self, layer: CachedAttention) -> bool:
        """Whether a layer has to know itself which slots it uses, and for which positions."""
        return self.layered or layer.window > 0

    def heads(self, layer: CachedAttention) -> int:
        """Heads that choose slots of their own."""
        return layer.keys.meta["val"].shape[1] if self.per_head else 1

    def _length_state(self) -> str:
        """The state that counts the slots of all layers."""
        counted = {self.states[layer.key_state].occupancy for layer in self.layers}
        occupancy = counted.pop()
        assert occupancy is not None and not counted
        return occupancy.state

    def _position_state(self) -> str:
        """The state that says which positions the slots of all layers hold."""
        (name,) = {spec.state for spec in self.inputs if spec.state and self._holds_positions(spec.state)}
        return name

    def _holds_positions(self, name: str) -> bool:
        state = self.states[name]
        return state.kind == "position" and state.occupancy == self.states[self.layers[0].key_state].occupancy

    def _shift_positions(self) -> None:
        """Everything that reads positions reads them less the state ``shift``."""
        state = State(self.free("shift"), "shift", "int64", (BATCH,))
        positions, shift = self.positions, self.take(state, self._blank(state))
        readers = list(positions.users)
        with after(shift):
            moved, same = call(self.module.graph, _shifted, positions, shift, like=self.layers[0].node)
        redirect(readers, positions, moved)
        self.positions, self.shift = moved, state.name
        self.give(state, same)

    def _split_lengths(self) -> None:
        """One length per layer, and slot axes of their own."""
        count, whole = len(self.layers), self.nodes[self.length]
        slots = slot_axis(self.states[self.layers[0].key_state].axes)
        self.respell(self.length, self.sample(self.length)[:, None].repeat(1, count), axes=(BATCH, count))
        with after(whole):
            lengths = call(self.module.graph, torch.unbind, whole, 1, like=self.layers[0].node)
        for reader in list(whole.users):  # of the shared slots, which go when every layer has its own
            if is_call(reader, ops.cache_write, ops.cache_mask):
                reader.replace_input_with(whole, lengths[0])
        self.lengths = list(lengths)
        for place, (layer, length) in enumerate(zip(self.layers, lengths, strict=True)):
            for write in (layer.keys, layer.values):
                write.update_arg(2, length)
            axis = fresh(f"{slots}{layer.layer}", self.ranges)
            for name in (layer.key_state, layer.value_state):
                axes = tuple(axis if one == slots else one for one in self.states[name].axes)
                used = Occupancy(self.length, place)
                self.respell(name, self.sample(name), axes=axes, occupancy=used)

    def _add_slots(self, place: int, layer: CachedAttention) -> tuple[str, Node]:
        """Slots of the layer's own: the state of their positions, and the mask that follows from them."""
        heads, cache = self.heads(layer), self.states[layer.key_state]
        axis = slot_axis(cache.axes)
        assert axis is not None
        state = State(
            self.free(f"position_{layer.layer}"),
            *("position", "int64", (BATCH, heads, axis, 1)),
            initial=-1,
            layer=layer.layer,
            occupancy=cache.occupancy,
        )
        slots = self.take(state, self.sample(self.shared).repeat(1, heads, 1, 1))
        groups = layer.query.meta["val"].shape[1] // heads if heads > 1 else 1
        operands = (slots, self.positions, self.of_role("mask"), self.lengths[place])
        graph, hiding = self.module.graph, layer.hiding
        if not layer.fused:
            self._own_sizes(layer)
        Shapes.attached(self.module).refresh(self.module, until=hiding.node)
        with graph.inserting_before(hiding.node):
            written, mask = call(graph, _own_mask, *operands, layer.window, groups, like=layer.node)
            spelled = mask if hiding.spelled is None else call(graph, hiding.spelled, mask, like=layer.node)
        self.give(state, written, written=True)
        hiding.node.replace_input_with(hiding.operand, spelled)
        return state.name, mask

    def _own_sizes(self, layer: CachedAttention) -> None:
        """What is made of a layer's cache takes the number of slots from it, and not from the slots of all layers."""
        slots, graph = layer.keys.meta["val"].shape[2], self.module.graph
        inside = (reaches(layer.keys) | reaches(layer.values)) & ancestors(layer.node)
        for node in [node for node in graph.nodes if node in inside]:
            for size in node.all_input_nodes:
                if is_call(size, aten.sym_size.int) and same_size(size.meta["val"], slots):
                    with graph.inserting_before(node):
                        own = graph.call_function(aten.sym_size.int, (layer.keys, 2))
                    own.meta["val"] = slots
                    node.replace_input_with(size, own)

    def _add_memory(self, layer: CachedAttention, mask: Node) -> tuple[str, ...]:
        """The tap: the states of what it remembers of this attention."""
        states = [self._memory_state(layer, memory) for memory in self.tap.memory(layer)]
        if not states:
            return ()
        taken = [self.take(state, self._blank(state)) for state in states]
        operands = (layer.query, layer.keys, mask, self.positions, *taken)
        graph = self.module.graph
        Shapes.attached(self.module).refresh(self.module, until=layer.node)
        with after(layer.node):
            observed = call(graph, _Observation(self.tap, layer.traits), *operands, like=layer.node)
        for state, node in zip(states, observed, strict=True):
            self.give(state, node)
        return tuple(state.name for state in states)

    def _memory_state(self, layer: CachedAttention, memory: Memory) -> State:
        cache = self.states[layer.key_state]
        slots = slot_axis(cache.axes)
        assert slots is not None
        axes = tuple(slots if axis == SLOTS else axis for axis in memory.axes)
        return State(
            self.free(f"{memory.name}_{layer.layer}"),
            *("score" if memory.moves else "memory", memory.dtype, axes),
            layer=layer.layer,
            occupancy=cache.occupancy if memory.moves else None,
        )

    def _blank(self, state: State) -> Tensor:
        """An example of a new state: small whole numbers, which any dtype holds exactly."""
        cache = self.sample(self.layers[0].key_state)
        sizes = {BATCH: cache.shape[0], slot_axis(state.axes): cache.shape[2]}
        shape = [axis if isinstance(axis, int) else sizes[axis] for axis in state.axes]
        generator = torch.Generator().manual_seed(len(self.inputs))
        return torch.randint(0, 3, shape, generator=generator).to(getattr(torch, state.dtype))


def state_program(
    build: Callable[..., Sequence[Node]],
    states: Sequence[State],
    example: tuple[Tensor, ...],
    ranges: Mapping[str, AxisRange],
) -> Program:
    """The program that takes which rows are due [batch] bool and every state, and returns the next states.

    ``build`` is given their nodes, ``due`` first, and inserts what makes the next ones of them. ``example`` begins with
    the rows that are due.
    """
    due = TensorSpec("due", "bool", (BATCH,), "due")
    inputs = (due, *(TensorSpec(s.name, s.dtype, s.axes, "state", s.name) for s in states))
    outputs = tuple(TensorSpec(f"next_{s.name}", s.dtype, s.axes, "state", s.name) for s in states)
    axes = {axis for spec in inputs for axis in spec.axes}
    chosen = {axis: bounds for axis, bounds in ranges.items() if axis in axes}
    opened = new_graph(inputs, chosen, example)
    given = placeholders(opened)
    opened.graph.output(tuple(build(*given)))
    return close_graph(Program(opened, inputs, outputs, chosen, example), opened)


def _shifted(positions: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Positions counted from ``shift`` [batch], those of padding as they are; and ``shift`` again."""
    return torch.where(positions >= 0, positions - shift[:, None], positions), shift.clone()


@dataclass(frozen=True)
class _Observation:
    """What a tap does at attentions that are alike, as a function of tensors."""

    tap: Tap
    traits: AttentionTraits

    def __call__(self, query: Tensor, key: Tensor, mask: Tensor, positions: Tensor, *memory: Tensor) -> Any:
        attention = Attention(query, key, mask, positions, self.traits.scale, self.traits.rotary)
        return self.tap.observe(attention, *memory)


def _own_mask(
    slots: Tensor, positions: Tensor, own: Tensor, length: Tensor, window: int, groups: int
) -> tuple[Tensor, Tensor]:
    """The layer's slots after the new tokens are written, and its mask [batch, 1 or heads, tokens, slots]."""
    new = positions[:, None, :, None].expand(-1, slots.shape[1], -1, -1)
    written = ops.cache_write(slots, new, length)
    mask = ops.cache_mask(written, positions, own, length, window)
    return written, mask.repeat_interleave(groups, dim=1)
