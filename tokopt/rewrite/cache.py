"""Give the step of a language model further state: what its attentions see, per layer and slot.

Attention itself stays the one fused op it is; a tap reads its operands beside it. Layers of a sliding window need
the positions of what they hold, so each gets slots of its own; so does every layer when lengths differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tokopt.analysis.cache import CachedAttention, input_nodes
from tokopt.analysis.graph import argument, is_call
from tokopt.analysis.rotary import Rotary
from tokopt.errors import PassError
from tokopt.ir.bundle import Bundle, State
from tokopt.ir.export import placeholders
from tokopt.ir.program import Axis, AxisRange, Program, TensorSpec
from tokopt.ir.shapes import Shapes
from tokopt.kernels import ops
from tokopt.rewrite.edit import after, call, close_graph, new_graph, redirect


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


def require_language_model(name: str, bundle: Bundle) -> None:
    """Raise PassError, for the pass of this name, where there is no cache."""
    if bundle.task != "causal-lm":
        raise PassError(f"{name} works on language models; this bundle is an {bundle.task}")


def in_float32(x: Tensor) -> Tensor:
    """``x`` in float32. A cast that does nothing would hide from the trace that the cache is written in place."""
    return x if x.dtype == torch.float32 else x.float()


@dataclass(frozen=True)
class Memory:
    """A state that a method keeps per layer; the axis ``"slots"`` makes it move with the slots."""

    name: str
    dtype: str
    axes: tuple[Axis, ...]


class Tap(Protocol):
    """What reads beside an attention, and the memory that it keeps."""

    def memory(self, layer: CachedAttention) -> tuple[Memory, ...]:
        """The states of one layer."""
        ...

    def observe(self, attention: Attention, *memory: Tensor) -> tuple[Tensor, ...]:
        """The next memory after one call of ``step``. Plain PyTorch, traced into the graph."""
        ...


@dataclass
class ProgramEdit:
    """An edit of ``step`` that takes states away or adds them."""

    bundle: Bundle
    module: GraphModule
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
        self.nodes = input_nodes(step, self.module.graph)
        self.ranges = dict(step.ranges)
        self.sizes = {
            axis: size
            for spec, tensor in zip(step.inputs, step.example, strict=True)
            for axis, size in zip(spec.axes, tensor.shape, strict=True)
        }

    def finish(self) -> Program:
        """The edited program."""
        self.module.graph.output_node().args = (tuple(self.results),)
        axes = {axis for spec in self.inputs for axis in spec.axes}
        program = replace(
            self.bundle.programs["step"],
            ranges={axis: bounds for axis, bounds in self.ranges.items() if axis in axes},
        )
        return close_graph(
            program,
            self.module,
            inputs=tuple(self.inputs),
            outputs=tuple(self.outputs),
            example=tuple(self.example),
        )

    def take(self, state: State, example: Tensor) -> Node:
        """A new state as an input."""
        graph = self.module.graph
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        with graph.inserting_after(last):
            node = graph.placeholder(state.name)
        self.states[state.name] = state
        self.inputs.append(TensorSpec(state.name, state.dtype, state.axes, "state"))
        node.meta["val"] = self._blank_value(self.inputs[-1], example)
        self.example.append(example)
        self.nodes[state.name] = node
        return node

    def _blank_value(self, spec: TensorSpec, example: Tensor) -> Tensor:
        shapes = Shapes.attached(self.module)
        shapes.name(spec, example, self.ranges)
        for axis, size in zip(spec.axes, example.shape, strict=True):
            if isinstance(axis, str):
                self.ranges.setdefault(axis, AxisRange())
                self.sizes.setdefault(axis, size)
        return shapes.blank(spec)

    def respell(self, name: str, example: Tensor, **changes: Any) -> None:
        """Give a state another dtype or other axes, and an example that has them."""
        state = self.states[name] = replace(self.states[name], **changes)
        place = [spec.name for spec in self.inputs].index(name)
        out = [spec.name for spec in self.outputs].index(state.output)
        self.inputs[place] = replace(self.inputs[place], **changes)
        self.outputs[out] = replace(self.outputs[out], **changes)
        self.example[place] = example
        self.nodes[name].meta["val"] = self._blank_value(self.inputs[place], example)

    def give(self, state: State, node: Node) -> None:
        """The next value of a state as an output."""
        self.outputs.append(TensorSpec(state.output, state.dtype, state.axes, "state"))
        self.results.append(node)

    def remove(self, name: str) -> None:
        """Take a state away, and with it the nodes that only made its next value."""
        place = [spec.name for spec in self.inputs].index(name)
        out = [spec.name for spec in self.outputs].index(self.states.pop(name).output)
        del self.inputs[place], self.example[place], self.outputs[out], self.results[out]
        graph = self.module.graph
        graph.output_node().args = (tuple(self.results),)
        graph.eliminate_dead_code()
        graph.erase_node(self.nodes.pop(name))


@dataclass
class StepEdit(ProgramEdit):
    """The edit of an eviction: new states in, a tap beside every attention, new states out.

    ``layered`` gives every layer a length and a slot axis of its own; ``per_head`` lets every key head hold
    tokens of its own; ``shifted`` counts positions from the state ``shift``, which grows as slots are renumbered.
    """

    tap: Tap
    layers: list[CachedAttention]
    layered: bool
    per_head: bool
    shifted: bool

    def run(self) -> tuple[Program, tuple[State, ...]]:
        """The edited program and its states."""
        if self.shifted:
            self._shift_positions()
        if self.layered:
            self._split_lengths()
        for layer in self.layers:
            if self.own_slots(layer):
                self._add_slots(layer)
            self._add_memory(layer)
        if all(self.own_slots(layer) for layer in self.layers):
            self.remove("slots")
        return self.finish(), tuple(self.states.values())

    def own_slots(self, layer: CachedAttention) -> bool:
        """Whether a layer has to know itself which slots it uses, and for which positions."""
        return self.layered or layer.window > 0

    def axis(self, layer: CachedAttention) -> str:
        """The name of the layer's slot axis."""
        return f"slots_{layer.index}" if self.layered else "slots"

    def heads(self, layer: CachedAttention) -> int:
        """Heads that choose slots of their own."""
        return layer.keys.meta["val"].shape[1] if self.per_head else 1

    def memory(self, layer: CachedAttention) -> list[Memory]:
        """The tap's memory of a layer, by the names and axes that it has in the program."""
        return [
            Memory(
                f"{m.name}_{layer.index}",
                m.dtype,
                tuple(self.axis(layer) if axis == "slots" else axis for axis in m.axes),
            )
            for m in self.tap.memory(layer)
        ]

    def _shift_positions(self) -> None:
        """Everything that reads positions reads them less the state ``shift``."""
        state = State("shift", "int64", ("batch",), "next_shift")
        positions, shift = self.nodes["positions"], self.take(state, self._blank(state))
        readers = list(positions.users)
        with after(shift):
            moved, same = call(self.module.graph, _shifted, positions, shift, like=self.layers[0].node)
        redirect(readers, positions, moved)
        self.nodes["positions"] = moved
        self.give(state, same)

    def _split_lengths(self) -> None:
        """One length per layer, and slot axes of their own."""
        count = len(self.layers)
        place = [spec.name for spec in self.inputs].index("length")
        self.respell("length", self.example[place][:, None].repeat(1, count), axes=("batch", count))
        with after(self.nodes["length"]):
            lengths = call(self.module.graph, torch.unbind, self.nodes["length"], 1, like=self.layers[0].node)
        for reader in list(
            self.nodes["length"].users
        ):  # of the shared slots, which go when every layer has its own
            if is_call(reader, ops.cache_write, ops.cache_mask):
                reader.replace_input_with(self.nodes["length"], lengths[0])
        for layer, length in zip(self.layers, lengths, strict=True):
            self.nodes[f"length_{layer.index}"] = length
            for write in (layer.keys, layer.values):
                write.update_arg(2, length)
            for name in (f"keys_{layer.index}", f"values_{layer.index}"):
                axes = tuple(self.axis(layer) if axis == "slots" else axis for axis in self.states[name].axes)
                example = self.example[[spec.name for spec in self.inputs].index(name)]
                self.respell(name, example, axes=axes)

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
        slots = self.take(state, shared.repeat(1, heads, 1, 1))
        groups = layer.query.meta["val"].shape[1] // heads if heads > 1 else 1
        length = self.nodes.get(f"length_{layer.index}", self.nodes["length"])
        operands = (slots, self.nodes["positions"], self.nodes["mask"], length)
        graph = self.module.graph
        Shapes.attached(self.module).refresh(self.module, until=layer.node)
        with graph.inserting_before(layer.node):
            written, mask = call(graph, _own_mask, *operands, layer.window, groups, like=layer.node)
        self.give(state, written)
        layer.node.replace_input_with(argument(layer.node, 3, "attn_mask"), mask)  # type: ignore[arg-type]
        self.nodes[f"mask_{layer.index}"] = mask

    def _add_memory(self, layer: CachedAttention) -> None:
        """The tap: what the tap remembers of this attention."""
        memory = self.memory(layer)
        if not memory:
            return
        states = [State(m.name, m.dtype, m.axes, f"next_{m.name}") for m in memory]
        taken = [self.take(state, self._blank(state)) for state in states]
        mask = self.nodes.get(f"mask_{layer.index}", layer.mask)
        operands = (layer.query, layer.keys, mask, self.nodes["positions"], *taken)
        graph = self.module.graph
        Shapes.attached(self.module).refresh(self.module, until=layer.node)
        with after(layer.node):
            observed = call(graph, _observation(self.tap, layer), *operands, like=layer.node)
        for state, node in zip(states, observed, strict=True):
            self.give(state, node)

    def _blank(self, state: State) -> Tensor:
        """An example of a new state: small whole numbers, which any dtype holds exactly."""
        shape = [axis if isinstance(axis, int) else self.sizes[axis] for axis in state.axes]
        generator = torch.Generator().manual_seed(len(self.inputs))
        return torch.randint(0, 3, shape, generator=generator).to(getattr(torch, state.dtype))


def state_program(
    function: Callable[..., tuple[Tensor, ...]],
    states: tuple[State, ...],
    example: tuple[Tensor, ...],
    ranges: Mapping[str, AxisRange],
) -> Program:
    """The program of a function that takes every state and returns the next ones."""
    inputs = tuple(TensorSpec(state.name, state.dtype, state.axes, "state") for state in states)
    outputs = tuple(TensorSpec(state.output, state.dtype, state.axes, "state") for state in states)
    axes = {axis for spec in inputs for axis in spec.axes}
    chosen = {axis: bounds for axis, bounds in ranges.items() if axis in axes}
    opened = new_graph(inputs, chosen, example)
    given = placeholders(opened)
    opened.graph.output(call(opened.graph, function, *given, like=given[0]))
    return close_graph(Program(opened, inputs, outputs, chosen, example), opened)


def _shifted(positions: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Positions counted from ``shift`` [batch], those of padding as they are; and ``shift`` again."""
    return torch.where(positions >= 0, positions - shift[:, None], positions), shift.clone()


def _observation(tap: Tap, layer: CachedAttention) -> Callable[..., tuple[Tensor, ...]]:
    """What the tap does, as a function of tensors."""

    def observe(query: Tensor, key: Tensor, mask: Tensor, positions: Tensor, *memory: Tensor) -> Any:
        return tap.observe(Attention(query, key, mask, positions, layer.scale, layer.rotary), *memory)

    return observe


def _own_mask(
    slots: Tensor, positions: Tensor, own: Tensor, length: Tensor, window: int, groups: int
) -> tuple[Tensor, Tensor]:
    """The layer's slots after the new tokens are written, and its mask [batch, 1 or heads, tokens, slots]."""
    new = positions[:, None, :, None].expand(-1, slots.shape[1], -1, -1)
    written = ops.cache_write(slots, new, length)
    mask = ops.cache_mask(written, positions, own, length, window)
    return written, mask.repeat_interleave(groups, dim=1)
